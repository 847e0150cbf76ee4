"""Batches from worker processes: they take no shared memory, and waiting for them ends."""

import multiprocessing
import multiprocessing.queues
import os
import select
import signal
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from images import loading
from images.loading import ImageFiles, PixelSource
from pipeline import processes
from pipeline.errors import Stopped, UserError
from pipeline.pairs import Images
from training.loop import train_until_finished

REQUEST = (np.arange(4), np.zeros(4, dtype=bool))


class Noise(ImageFiles):
    """Images that are in no file. Those of number 9 never come."""

    def __init__(self) -> None:
        super().__init__(Images(Path(), [f"{number}.png" for number in range(10)], np.arange(10)), 32, 10**6)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, dict[int, str]]:
        while 9 in numbers:  # a disk that does not answer, in a worker that ignores SIGTERM
            signal.pause()
        rng = np.random.default_rng(numbers)
        pixels = rng.integers(0, 256, (len(numbers), 32, 32, 3), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), {}


def source(workers: int) -> PixelSource:
    return PixelSource(Noise(), workers, torch.device("cpu"))


def test_batches_of_workers_take_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes of a batch come through the pipe. Of a tensor only the name of a shared file would."""
    received: list[int] = []
    pickling: Any = multiprocessing.queues._ForkingPickler  # type: ignore[attr-defined]
    loads = pickling.loads
    monkeypatch.setattr(pickling, "loads", lambda content: received.append(len(content)) or loads(content))
    (from_worker,) = source(1).batches([REQUEST])
    (alone,) = source(0).batches([REQUEST])
    assert torch.equal(from_worker, alone) and from_worker.is_contiguous(memory_format=torch.channels_last)
    assert max(received) >= from_worker.nbytes


@pytest.mark.parametrize("end", [Stopped("stopped", signal.SIGINT), KeyboardInterrupt()])
def test_waiting_for_a_disk_that_does_not_answer_ends(monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    monkeypatch.setattr(loading, "WAIT", 1)
    waiting = source(1)
    waited = []

    def stop(seconds: int) -> None:
        waited.append(seconds)
        if seconds == 2:
            raise end

    waiting.on_wait = stop
    before, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
    with pytest.raises(type(end)):
        list(waiting.batches([REQUEST, (np.array([9]), np.zeros(1, dtype=bool))]))
    assert waited == [1, 2] and set(active_children()) <= before
    assert handler in (signal.SIG_DFL, signal.getsignal(signal.SIGCHLD))


def load_and_be_killed(pipe: int) -> None:
    """Receive one batch of many, too large for a pipe, and say so."""
    batches = source(2).batches([(np.arange(60) % 9, np.zeros(60, dtype=bool))] * 20)
    next(batches)
    os.write(pipe, b"received")
    signal.pause()


def test_no_worker_outlives_a_trainer_that_is_killed() -> None:
    read, write = os.pipe()  # which the trainer and its workers hold open
    trainer = multiprocessing.get_context("fork").Process(target=load_and_be_killed, args=(write,))
    trainer.start()
    os.close(write)
    assert os.read(read, 8) == b"received"
    trainer.kill()
    trainer.join()
    assert select.select([read], [], [], 60)[0], "a worker still runs"
    assert os.read(read, 1) == b""
    os.close(read)


def test_images_that_do_not_come_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in range(loading.WAIT, 200, loading.WAIT):
        source(0).on_wait(seconds)
    assert capsys.readouterr().err == "no image was read for 60 s: does the disk or network folder answer?\n"


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_training_that_waits_for_images(tmp_path: Path, asked: signal.Signals) -> None:
    images = source(0)

    def validate(_: object) -> None:
        images.on_wait(5)
        os.kill(os.getpid(), asked)
        images.on_wait(10)

    progress = SimpleNamespace(step=0, seconds=0.0)
    trainer: Any = SimpleNamespace(progress=progress, images=images, validate=validate, metrics=[])
    with pytest.raises(Stopped, match="stopped while no image came; go on with --resume") as stopped:
        train_until_finished(trainer, tmp_path, 10)
    assert stopped.value.signal == asked


def no_room(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_system_without_room_for_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.DataLoader, "__iter__", no_room)
    with pytest.raises(UserError, match="cannot start .*No space left.*: they need a few kilobytes of /dev/shm"):
        list(source(1).batches([REQUEST]))
    for call in ("_spawn_process", "__init__"):  # Python starts processes with the first calls
        monkeypatch.setattr(processes.ProcessPoolExecutor, call, no_room)
        with pytest.raises(UserError, match="cannot start .*No space left"):
            list(processes.in_order(str, range(3), 2))
