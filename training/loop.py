"""A run from its first or last checkpoint to its end: epochs, checkpoints, TensorBoard's files, signals."""

import contextlib
import copy
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from images.loading import PixelSource
from metrics import Metric
from pipeline.errors import FULL_DISK, Stopped, UserError
from pipeline.progress import ProgressBar
from training import distributed
from training.checkpoints import model_state, resume, save_checkpoint
from training.described_scalars import Board
from training.trainer import Trainer


def train_until_finished(trainer: Trainer, run: Path, checkpoint_minutes: float) -> None:
    """Train from the checkpoint in the run's folder, where there is one, to the last epoch.

    best.pt is written with the next checkpoint, so that a small model, whose epochs take a second, does not write all
    the time.
    Raises Stopped, after a checkpoint, where Ctrl-C or SIGTERM ask for it.
    """
    progress = trainer.progress
    best: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    if distributed.by_writer((run / "last.pt").exists):
        sizes = distributed.all_or_none(lambda: resume(run, trainer))
        print(f"resuming in epoch {progress.epoch}, after step {progress.step}")
    if distributed.is_writer():
        roll_back_curves(run, sizes)
    started, before = time.monotonic(), progress.seconds
    saved = started

    with StopRequest() as request, curves(run, trainer.metrics) as board:

        def checkpoint() -> None:
            nonlocal saved
            progress.seconds = before + time.monotonic() - started
            trainer.demand_finite(board)
            board.flush()
            save_checkpoint(run, trainer, best)
            best.clear()
            saved = time.monotonic()

        def pause() -> None:
            asked, due = distributed.reduce_max(request.signal, time.monotonic() - saved > 60 * checkpoint_minutes)
            if asked or due or trainer.finished():
                checkpoint()
            if asked and not trainer.finished():
                raise Stopped(f"stopped after step {progress.step}; go on with --resume", asked)

        def while_waiting(seconds: int) -> None:
            if request.signal:
                raise Stopped("stopped while no image came; go on with --resume", request.signal)
            PixelSource.say_waiting(seconds)

        if isinstance(trainer.images, PixelSource):
            trainer.images.on_wait = while_waiting
        if progress.step == 0:
            trainer.validate(board)  # the untrained model: where the curves begin
            ProgressBar.write(trainer.last_validation)
        while not trainer.finished():
            trainer.train_one_epoch(board, pause)
            improved = trainer.validate(board)
            ProgressBar.write(trainer.last_validation)
            board.flush()  # so that the curves are seen
            if improved and distributed.is_writer():
                best = copy.deepcopy(model_state(trainer))
            pause()


class StopRequest:
    """Ctrl-C and SIGTERM, noted until training can stop. A second Ctrl-C stops at once."""

    signal = 0
    """The signal that came, or 0."""

    def __enter__(self) -> "StopRequest":
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        """The signals' handler."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class NoBoard(Board):
    """TensorBoard's writer in a process that does not write."""

    def __init__(self) -> None:
        pass

    def add_scalar(self, *_: object, **__: object) -> None:
        """Write nothing."""

    def flush(self) -> None:
        """Write nothing."""


@contextlib.contextmanager
def curves(run: Path, metrics: list[Metric]) -> Iterator[Board]:
    """TensorBoard's writer of a run. Raises UserError where the disk is full or not writable."""
    if not distributed.is_writer():
        yield NoBoard()
        return
    # The writer's thread fails first, and prints a traceback; then each call raises.
    usual, threading.excepthook = threading.excepthook, lambda _: None
    try:
        with Board(run, metrics) as board:
            yield board
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(f"cannot write in {run}: {error.strerror}; make room and go on with --resume") from None
    finally:
        threading.excepthook = usual


def roll_back_curves(run: Path, sizes: dict[str, int]) -> None:
    """Cut TensorBoard's files in a run's folder back to `sizes` in bytes, by name. Files without a size are removed."""
    for path in run.glob("events.out.tfevents.*"):
        if path.name in sizes:
            with path.open("r+b") as file:
                file.truncate(sizes[path.name])
        else:
            path.unlink()
