"""How close training comes to the bare model, and what precision and batches are worth.

    python benchmarks/training.py [--config FILE.yaml] [--work WORK] [--batch-sizes 16 ...] [--precisions float32 bf16]
        [--sources raw jpeg files] [--batches random] [--steps 6] [--rounds 3] [--device cpu]

The bare model is the backbone alone: forward, backward and Adam's step on 2B random images that are on the device
already, in the same precision and memory format; a pair costs two images, its own and its neighbor's (in neighborhood
batches one, and then the bare model has B). Efficiency is training's images a second over the bare model's. Training is
step 4's own loop, with L_img and L_text: images from the source, texts, losses, curves. Its first two steps, in which
the workers start, are not timed; bare and trained steps alternate, and what is printed is the median round. WORK has to
be prepared (steps 0 to 3).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from timing import machine, print_table, synchronise  # noqa: E402

from datasets import load_prepared  # noqa: E402
from images.backbones import Backbone  # noqa: E402
from models import build_model  # noqa: E402
from pipeline.command_line import run_script  # noqa: E402
from pipeline.devices import autocast  # noqa: E402
from pipeline.files import read_array  # noqa: E402
from pipeline.schema import Settings  # noqa: E402
from pipeline.settings import load_settings  # noqa: E402
from pipeline.work import Work  # noqa: E402
from training.image_sources import image_source  # noqa: E402
from training.runs import Weights  # noqa: E402
from training.trainer import Trainer, build_trainer  # noqa: E402

WARM_UP = 2


class Enough(Exception):
    """As many steps were timed as were wanted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "web_news.yaml", help="settings of WORK")
    parser.add_argument("--work", type=Path, help="a prepared folder; by default that of the config")
    parser.add_argument("--backbone", default="resnet50", help="trained from random weights, at --size pixels")
    parser.add_argument("--size", type=int, default=224, help="images are --size x --size pixels")
    parser.add_argument("--max-words", type=int, default=40, help="words of a text that the GRU reads")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16], help="pairs in a minibatch")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"])
    parser.add_argument("--sources", nargs="+", default=["raw"], help="raw, jpeg (pixel caches) and files")
    parser.add_argument("--batches", nargs="+", default=["random"], help="random, neighborhoods")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, the bare model too")
    parser.add_argument("--workers", type=int, help="processes that read images; by default one a core")
    parser.add_argument("--steps", type=int, default=6, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of bare and of trained steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    rows = []
    for precision in arguments.precisions:
        for batch_size in arguments.batch_sizes:
            for source in arguments.sources:
                for batches in arguments.batches:
                    settings = settings_of(arguments, precision, batch_size, source, batches)
                    rows.append([precision, batch_size, source, batches, *measured(settings, arguments)])
    head = ["precision", "batch", "source", "batches", "pairs/s", "images/s", "bare images/s", "efficiency"]
    print_table(head, rows)
    print(f"\n{arguments.backbone}, {arguments.size} pixels, {machine(arguments.device)}")


def settings_of(arguments: argparse.Namespace, precision: str, batch_size: int, source: str, batches: str) -> Settings:
    """The config's settings, with the paper's model."""
    settings = load_settings(arguments.config)
    if arguments.work:
        settings.work = str(arguments.work)
    settings.deterministic = False
    settings.model.image.backbone, settings.model.image.size = arguments.backbone, arguments.size
    settings.model.image.weights, settings.model.image.trainable = "none", True
    settings.model.text.encoder, settings.model.text.max_words = "gru", arguments.max_words
    settings.training.precision, settings.training.batch_size = precision, batch_size  # type: ignore[assignment]
    settings.training.pixel_cache = {"files": "none"}.get(source, source)  # type: ignore[assignment]
    settings.training.batches = batches  # type: ignore[assignment]
    settings.training.compile = arguments.compile
    settings.training.workers, settings.training.log_every = arguments.workers, 10
    return settings


def measured(settings: Settings, arguments: argparse.Namespace) -> list[Any]:
    """Pairs and images a second of training, images a second of the bare model, and their ratio."""
    device, size = torch.device(arguments.device), settings.training.batch_size
    data = load_prepared(settings.work_folder, settings.model.text.max_words)
    model = build_model(settings.model, read_array(Work(settings.work_folder).word_vectors), settings.seed).to(device)
    images = image_source(settings, data, device)
    trainer = build_trainer(settings, Weights(1, 0.3, 0.2), data, model, images, device)
    a_pair = 1 if settings.training.batches == "neighborhoods" else 2
    trained, bare = [], []
    for _ in range(arguments.rounds):
        bare.append(bare_images_a_second(settings, arguments, a_pair * size, device))
        trained.append(pairs_a_second(trainer, arguments.steps))
    pairs, alone = median(trained), median(bare)
    efficiency = median(a_pair * here / there for here, there in zip(trained, bare, strict=True))
    return [f"{pairs:.1f}", f"{a_pair * pairs:.1f}", f"{alone:.1f}", f"{efficiency:.2f}"]


def pairs_a_second(trainer: Trainer, steps: int) -> float:
    """Of so many steps of step 4's loop, in the middle of an epoch."""
    done = started = 0.0

    def after_batch() -> None:
        nonlocal done, started
        done += 1
        if done in (WARM_UP, WARM_UP + steps):
            synchronise(str(trainer.device))
        if done == WARM_UP:
            started = time.perf_counter()
        elif done == WARM_UP + steps:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as board:
        try:
            trainer.train_one_epoch(board, after_batch)
        except Enough:
            seconds = time.perf_counter() - started
        else:
            sys.exit(f"an epoch has {int(done)} batches, and {WARM_UP + steps} are wanted; lower --steps")
    trainer.progress.batches_done = 0  # the next call begins an epoch
    return steps * trainer.training.batch_size / seconds


def bare_images_a_second(settings: Settings, arguments: argparse.Namespace, images: int, device: torch.device) -> float:
    """Of the backbone's forward pass, backward pass and optimiser step, alone, on so many images at a time."""
    network = Backbone(settings.model.image.backbone, "none").to(device).train().network
    if settings.training.compile:
        network.compile()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    size = settings.model.image.size
    pixels = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
    for step in range(WARM_UP + arguments.steps):
        if step == WARM_UP:
            synchronise(str(device))
            started = time.perf_counter()
        with autocast(settings.training.precision, device):
            features = network(pixels)
        optimizer.zero_grad(set_to_none=True)
        features.float().square().mean().backward()
        optimizer.step()
    synchronise(str(device))
    return arguments.steps * images / (time.perf_counter() - started)


if __name__ == "__main__":
    run_script(main)
