"""Step 4: train the two-stream model with the losses that preserve semantic neighborhoods.

    python train_cross_modal_retrieval_model.py 1 0.3 0.2 --config configs/openclipart.yaml

The three numbers are the weights of the symmetric term (text to image), of L_img and of L_text (Eq. 8): 1 0 0 is the
baseline ANG+NP+SYM, 1 0.3 0.2 the paper's method. With --loss.base fine_grained SYM is 0: the pairwise loss takes both
ways at once. It reads the labels of train_siamese_labels.py.

Reads pairs.parquet, the token sequences, the word vectors and the neighbor table in WORK, and the images. Writes
WORK/runs/<run>/: config.yaml, last.pt, best.pt (of the epoch that training.select chooses), TensorBoard events and
run.json.

Ctrl-C and SIGTERM write a checkpoint and stop. With --resume the run then ends as if it had never been stopped.

On several GPUs: torchrun --nproc_per_node=4 train_cross_modal_retrieval_model.py 1 0.3 0.2. They share each minibatch.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command_line import make_parser, mistakes_in_name, parse_settings, run_script, say_next
from pipeline.errors import UserError
from pipeline.files import lock, read_array, write_json
from pipeline.schema import Settings
from pipeline.settings import mistakes_of_weights
from pipeline.steps import EXTRACT_DOC2VEC, FIND_NEIGHBORS, PREPARE, TRAIN_DOC2VEC, require, versions
from pipeline.work import Work

if TYPE_CHECKING:
    import torch

    from datasets import Prepared
    from models import TwoStream
    from training.runs import Weights
    from training.trainer import Trainer


def main(argv: list[str] | None = None) -> Path:
    """Train, alone or with the other processes that torchrun started. Returns the run's folder."""
    settings, config_file, arguments = parse(argv)  # before torch is imported, which takes seconds
    from training import distributed
    from training.runs import Weights

    weights = Weights(arguments.sym, arguments.img, arguments.text)
    with distributed.started():
        return train(settings, config_file, weights, arguments)


def parse(argv: list[str] | None) -> tuple[Settings, Settings, argparse.Namespace]:
    """Settings, those before the flags, and the other arguments. Raises UserError that lists every mistake.

    Of several processes the first one prints it.
    """
    parser = make_parser(__doc__, "neighbors", "model", "loss", "training")
    parser.add_argument("sym", metavar="SYM", type=float, help="weight of the symmetric term, text to image")
    parser.add_argument("img", metavar="IMG", type=float, help="weight of L_img (the paper's beta)")
    parser.add_argument("text", metavar="TEXT", type=float, help="weight of L_text (the paper's alpha)")
    parser.add_argument("--resume", action="store_true", help="resume an unfinished run")
    parser.add_argument("--overwrite", action="store_true", help="train an existing run anew")
    parser.add_argument(
        "--refresh", action="store_true", help="train it anew where its settings or inputs have changed"
    )
    parser.add_argument(
        "--name", help="name of the run's folder (default: the weights and what differs from the config)"
    )
    try:
        return parse_settings(parser, argv, also=mistakes_in_weights)
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)
        raise


def mistakes_in_weights(settings: Settings, arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the weights on the command line, a sentence each."""
    given = {"SYM": arguments.sym, "IMG": arguments.img, "TEXT": arguments.text}
    found = [
        f"the weight {name} is {weight:g} and must be a finite number, 0 or more"
        for name, weight in given.items()
        if not (math.isfinite(weight) and weight >= 0)
    ]
    found += mistakes_in_name(settings, arguments)
    return found + mistakes_of_weights(settings.loss, arguments.sym, arguments.img)


def folder_of(settings: Settings, config_file: Settings, arguments: argparse.Namespace) -> Path:
    """The folder of the run that the command line asks for. `config_file`: the settings before its flags."""
    from training.runs import Weights, run_name

    weights = Weights(arguments.sym, arguments.img, arguments.text)
    return Work(settings.work_folder).runs / (arguments.name or run_name(settings, config_file, weights))


def train(settings: Settings, config_file: Settings, weights: "Weights", arguments: argparse.Namespace) -> Path:
    """Check the inputs, claim the run's folder, train until finished, and write run.json."""
    from training import distributed, tensorboard_pages
    from training.image_sources import image_source
    from training.loop import train_until_finished
    from training.portable import keep_encoder_files
    from training.runs import clear_run, start_run, what_changed_since
    from training.trainer import build_trainer

    run = folder_of(settings, config_file, arguments)
    device, data, model = distributed.writer_first(lambda: prepare(settings, weights))
    with contextlib.ExitStack() as held:

        def claim() -> bool:
            held.enter_context(lock(run))
            if arguments.overwrite or (arguments.refresh and what_changed_since(run, settings)):
                clear_run(run)
            return start_run(run, settings, weights, resume=arguments.resume)

        if not distributed.by_writer(claim):
            return run
        images = distributed.writer_first(lambda: image_source(settings, data, device))
        show = functools.partial(
            tensorboard_pages.show_validation,
            data=data,
            work=settings.work_folder,
            every=settings.training.show_results_every,
            max_pixels=settings.dataset.max_pixels,
        )
        trainer = distributed.all_or_none(lambda: build_trainer(settings, weights, data, model, images, device, show))
        say_what_is_trained(trainer, run)
        train_until_finished(trainer, run, settings.training.checkpoint_minutes)
        progress = trainer.progress
        best = {"val_loss": progress.best_loss, "val_recall_at_1": progress.best_recall}
        best["best_epoch"] = progress.best_epoch
        if distributed.is_writer():
            tensorboard_pages.write_hparams(run, weights, settings, config_file, best, progress.step)
            keep_encoder_files(run, settings)
            write_json(
                run / "run.json",
                {
                    "epochs": progress.epoch,
                    "best_epoch": progress.best_epoch,
                    "best_val_loss": progress.best_loss,
                    "val_recall_at_1": progress.best_recall,
                    "versions": versions(),
                    "seconds": round(progress.seconds, 2),
                },
            )
    figure = f"lowest validation loss {progress.best_loss:.4f}"
    if settings.training.select == "val_recall":
        figure = f"highest validation Recall@1 {progress.best_recall:.4f}"
    print(f"{figure} in epoch {progress.best_epoch} of {progress.epoch}")
    for name in ("best.pt", "last.pt", "run.json"):
        print(f"wrote {run / name}")
    say_next("python", "evaluate.py", "--run", run)
    return run


def prepare(settings: Settings, weights: "Weights") -> "tuple[torch.device, Prepared, TwoStream]":
    """The device, the prepared data and the untrained model. Raises UserError where a step has to be run (again)."""
    from images.networks import size_warning
    from models import build_model
    from pipeline.devices import be_deterministic, choose_device, use_precision
    from text_space.spaces import space_of
    from training import distributed
    from training.runs import steps_of_loss
    from training.text_streams import load_pairs

    for step in (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC):
        require(step, settings)
    for step in steps_of_loss(settings, weights):
        require(step, settings, space_of(settings).made_from if step is FIND_NEIGHBORS else None)
    device = choose_device(settings.training.device)
    if device.type == "cuda":
        device = distributed.gpu()
    use_precision(settings.training.precision)
    be_deterministic(settings.deterministic)
    data = load_pairs(settings.work_folder, settings.features_folder, settings.model.text, device)
    if warning := size_warning(settings.model.image):
        print(warning)
    demand_enough_pairs(settings.training.batch_size, settings.training.batches, len(data.rows["train"]))
    model = build_model(settings.model, read_array(Work(settings.work_folder).word_vectors), settings.seed)
    return device, data, model.to(device)


def demand_enough_pairs(batch_size: int, batches: str, train_pairs: int) -> None:
    """Raise UserError where a minibatch has fewer than two pairs for each of the processes that share it."""
    from training import distributed

    count = distributed.processes()
    fewest = batch_size - (batches == "neighborhoods")  # a couple is not split
    if count > 1 and min(fewest, train_pairs) < 2 * count:
        raise UserError(
            f"training.batch_size {batch_size} of {train_pairs:,} train pairs is too small for {count} processes, "
            "which need two pairs of it or more each; start fewer"
        )


def say_what_is_trained(trainer: "Trainer", run: Path) -> None:
    """Print the run, its pairs, its parameters and where it trains."""
    from training import distributed

    training = trainer.training
    if training.batches == "neighborhoods" and not trainer.objective.within_batch:
        print("IMG and TEXT are 0, so that no neighbor is needed: batches are random, not neighborhoods")
    learned = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    train, val = len(trainer.data.rows["train"]), len(trainer.data.rows["val"])
    count = distributed.processes()
    where = f"{trainer.device}, in {count} processes" if count > 1 else str(trainer.device)
    print(f"training {run.name}: {train:,} train and {val:,} val pairs, {learned:,} parameters, on {where}")
    best = "the lowest val loss" if training.select == "val_loss" else f"the highest {training.select_k}-way Recall@1"
    print(f"of the val split, i2t is image to text and t2i text to image; * marks {best} so far")


if __name__ == "__main__":
    run_script(main)
