"""Step 4: train the two-stream model with the losses that preserve semantic neighborhoods.

    python train_cross_modal_retrieval_model.py 1 0.3 0.2 --config configs/openclipart.yaml

The three numbers are the weights of the symmetric term (text to image), of L_img and of L_text (Eq. 8): 1 0 0 is the
baseline ANG+NP+SYM, 1 0.3 0.2 the paper's method. With --loss.base fine_grained SYM is 0: the pairwise loss takes both
ways at once; it reads the labels of train_siamese_labels.py.

Reads pairs.parquet, the token sequences, the word vectors and the neighbor table in WORK, and the images. Writes
WORK/runs/<run>/: config.yaml, last.pt, best.pt (lowest validation loss), TensorBoard events and run.json.

Ctrl-C and SIGTERM write a checkpoint and stop; with --resume the run goes on to what it would have become anyway.

On several GPUs: torchrun --nproc_per_node=4 train_cross_modal_retrieval_model.py 1 0.3 0.2. They share each minibatch.
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets import Prepared, load_prepared
from models import TwoStream, build_model
from pipeline.command_line import Stopped, make_parser, parse_settings, run_script, say_next
from pipeline.errors import UserError
from pipeline.files import lock, read_array, write_json
from pipeline.settings import Settings
from pipeline.steps import EXTRACT_DOC2VEC, PREPARE, TRAIN_DOC2VEC, require, versions
from training import distributed, tensorboard_pages
from training.embedding import image_source
from training.runs import (
    Weights,
    be_deterministic,
    choose_device,
    clear_run,
    run_name,
    start_run,
    steps_of_loss,
    what_changed_since,
)
from training.trainer import StopRequest, Trainer, curves, roll_back_curves


def main(argv: list[str] | None = None) -> Path:
    """Train, alone or with the other processes that torchrun started; returns the run's folder."""
    with distributed.started():
        return train_together(argv)


def train_together(argv: list[str] | None) -> Path:
    """`main` in each process."""
    parser = make_parser(__doc__)
    parser.add_argument("sym", type=float, help="weight of the symmetric term, text to image")
    parser.add_argument("img", type=float, help="weight of L_img (the paper's beta)")
    parser.add_argument("text_weight", metavar="text", type=float, help="weight of L_text (the paper's alpha)")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    parser.add_argument("--overwrite", action="store_true", help="train a run that is there already once more")
    parser.add_argument("--refresh", action="store_true", help="do so where its settings or inputs have changed since")
    settings, config_file, arguments = distributed.agreed(
        lambda: parse_settings(parser, argv, also=mistakes_in_weights)
    )
    weights = Weights(arguments.sym, arguments.img, arguments.text_weight)
    run = settings.work_folder / "runs" / run_name(settings, config_file, weights)

    def prepare() -> tuple[torch.device, Prepared, TwoStream]:
        for step in (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC):
            require(step, settings)
        for step in steps_of_loss(settings, weights):
            require(step, settings)
        device, data = choose_device(settings), load_prepared(settings)
        demand_enough_pairs(settings, len(data.rows["train"]))
        be_deterministic(settings)
        model = build_model(settings, read_array(settings.work_folder / "doc2vec" / "word_vectors.npy")).to(device)
        return device, data, model

    device, data, model = distributed.agreed(prepare)
    with contextlib.ExitStack() as held:

        def claim() -> bool:
            held.enter_context(lock(run))
            if arguments.overwrite or (arguments.refresh and what_changed_since(run, settings)):
                clear_run(run)
            return start_run(run, settings, weights, resume=arguments.resume)

        if not distributed.by_writer(claim):
            return run
        images = distributed.writer_first(lambda: image_source(settings, data, device))
        trainer = distributed.agreed(lambda: Trainer(settings, weights, data, model, images, device))
        if settings.training.batches == "neighborhoods" and not trainer.within_batch:
            print("IMG and TEXT are 0 and no neighbor is needed: batches are random, not neighborhoods")
        learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        train, val = len(data.rows["train"]), len(data.rows["val"])
        where = f"{device}, in {distributed.processes()} processes" if distributed.processes() > 1 else str(device)
        print(f"training {run.name}: {train:,} train and {val:,} val pairs, {learned:,} parameters, on {where}")
        train_until_finished(trainer, run)
    print(f"lowest validation loss {trainer.best_loss:.4f} in epoch {trainer.best_epoch} of {trainer.epoch}")
    for name in ("best.pt", "last.pt", "run.json"):
        print(f"wrote {run / name}")
    say_next("python", "evaluate.py", "--run", run)
    return run


def demand_enough_pairs(settings: Settings, train: int) -> None:
    """Raise UserError where a minibatch, of `train` pairs in all, has too few for the processes that share it."""
    count, size = distributed.processes(), settings.training.batch_size
    fewest = size - (settings.training.batches == "neighborhoods")  # not to part a couple
    if count > 1 and min(fewest, train) < 2 * count:
        raise UserError(
            f"training.batch_size {size} of {train:,} train pairs is too small for {count} processes, which take two "
            "pairs of it or more each; start fewer"
        )


def train_until_finished(trainer: "Trainer", run: Path) -> None:
    """The training loop, from the checkpoint in the run's folder on where there is one.

    Raises Stopped, after a checkpoint, where Ctrl-C or SIGTERM ask for it.
    """
    if (run / "last.pt").exists():
        distributed.agreed(lambda: trainer.load(run / "last.pt"))
        print(f"going on in epoch {trainer.epoch}, after step {trainer.step}")
    elif distributed.is_writer():
        roll_back_curves(run, {})
    minutes = trainer.settings.training.checkpoint_minutes
    started = saved = time.monotonic()
    before = trainer.seconds

    with StopRequest() as request, curves(run) as board:

        def checkpoint() -> None:
            nonlocal saved
            trainer.seconds = before + time.monotonic() - started
            trainer.checkpoint(board)
            saved = time.monotonic()

        def after_batch() -> None:
            asked, due = distributed.greatest(request.signal, time.monotonic() - saved > 60 * minutes)
            if asked or due:
                checkpoint()
            stop_where_asked(asked)

        def stop_where_asked(asked: int) -> None:
            if asked:
                raise Stopped(f"stopped after step {trainer.step}; go on with --resume", asked)

        if trainer.step == 0:
            trainer.validate(board)  # the untrained model: where the curves begin
            tqdm.write(trainer.shown)
        while not trainer.finished():
            trainer.train_one_epoch(board, after_batch)
            improved = trainer.validate(board)
            tqdm.write(trainer.shown)
            if improved:
                distributed.by_writer(lambda: trainer.save(run / "best.pt"))
            checkpoint()
            if not trainer.finished():
                stop_where_asked(*distributed.greatest(request.signal))
        if not distributed.is_writer():
            return
        best = {"val_loss": trainer.best_loss, "val_recall_at_1": trainer.best_recall, "best_epoch": trainer.best_epoch}
        tensorboard_pages.write_hparams(run, trainer.weights, trainer.settings, best, trainer.step)
    write_json(
        run / "run.json",
        {
            "epochs": trainer.epoch,
            "best_epoch": trainer.best_epoch,
            "best_val_loss": trainer.best_loss,
            "val_recall_at_1": trainer.best_recall,
            "versions": versions(),
            "seconds": round(trainer.seconds, 2),
        },
    )


def mistakes_in_weights(settings: Settings, arguments: Any) -> list[str]:
    """What is wrong with the weights on the command line, a sentence each."""
    given = {"SYM": arguments.sym, "IMG": arguments.img, "TEXT": arguments.text_weight}
    found = [
        f"the weight {name} is {weight:g} and must be a finite number, 0 or more"
        for name, weight in given.items()
        if not (math.isfinite(weight) and weight >= 0)
    ]
    if settings.loss.base == "fine_grained" and arguments.sym:
        found.append("loss.base fine_grained takes both ways at once and has no symmetric term; let SYM be 0")
    if settings.loss.structure == "ground_truth" and arguments.img:
        found.append("loss.structure ground_truth needs the weight IMG 0: an image's only true neighbor is itself")
    return found


if __name__ == "__main__":
    run_script(main)
