"""Batches of pixels or cached features, from files or a pixel cache."""

import itertools
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from images.checked_rows import CheckedRows
from images.files import UnreadableImage, load_image
from images.pixel_cache import PixelCache, no_longer_readable
from pipeline.devices import to_device
from pipeline.errors import UserError
from pipeline.pairs import Images
from pipeline.processes import end_with_parent, no_processes

T = TypeVar("T")

WAIT = 5
"""Seconds between two looks at a worker that does not answer."""
WARN_AFTER = 60
"""Seconds without an image after which a warning is printed."""


class ImageFiles(Dataset[tuple[Tensor, dict[int, str]]]):
    """Image files, decoded as they are asked for, S x S pixels."""

    def __init__(
        self,
        images: Images,
        size: int,
        max_pixels: int,
        describe: Callable[[Path, UnreadableImage], str] = no_longer_readable,
        interpolation: str = "bilinear",
    ) -> None:
        self.images, self.size, self.max_pixels, self.describe = images, size, max_pixels, describe
        self.interpolation = interpolation
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, dict[int, str]]:
        """A batch (B, 3, S, S), and what is wrong with the unreadable files in it, by number. Those are black.

        It is returned, as an exception from a worker process has the worker's traceback in its message.
        """
        pixels = np.zeros((len(numbers), self.size, self.size, 3), dtype=np.uint8)
        unreadable: dict[int, str] = {}
        for line, number in enumerate(numbers):
            path = self.images.root / self.images.paths[number]
            try:
                pixels[line] = np.asarray(load_image(path, self.size, self.max_pixels, self.interpolation))
            except UnreadableImage as error:
                unreadable[number] = self.describe(path, error)
        return _channels_first(pixels), unreadable


class CachedImages(Dataset[tuple[Tensor, dict[int, str]]]):
    """Images from a pixel cache."""

    def __init__(self, cache: PixelCache) -> None:
        self.cache = cache
        self.unreadable = cache.unreadable

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, dict[int, str]]:
        """As `ImageFiles`. `unreadable` is known beforehand: only images lost since then are returned."""
        pixels, lost = self.cache.batch(numbers)
        return _channels_first(pixels), lost


def _channels_first(pixels: np.ndarray) -> Tensor:
    """(B, S, S, 3) as (B, 3, S, S) without a copy, in PyTorch's memory format channels_last."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def prefetch(batches: Iterable[T], count: int = 3) -> Iterator[T]:
    """Prefetch `count` batches in a thread."""
    with ThreadPoolExecutor(1) as thread:
        rest = iter(batches)

        def read() -> list[T]:
            """The next batch, or nothing at the end."""
            return list(itertools.islice(rest, 1))

        waiting = deque(thread.submit(read) for _ in range(count))
        while batch := waiting.popleft().result():
            waiting.append(thread.submit(read))
            yield batch[0]


class _Sent:
    """A batch on its way from a worker.

    An array goes through a pipe. A tensor would take shared memory, of which a container has 64 MB: where a batch does
    not fit, the loader waits for it for ever.
    """

    def __init__(self, batch: Any) -> None:
        pixels, self.unreadable = batch  # as `__getitems__` returns them: (B, 3, S, S), and a dict
        self.pixels: np.ndarray | Tensor = pixels.permute(0, 2, 3, 1).numpy()

    def pin_memory(self) -> "_Sent":
        """The batch in pinned memory. The loader's own thread asks for it."""
        self.pixels = torch.from_numpy(self.pixels).pin_memory()
        return self

    def tensor(self) -> Tensor:
        """The pixels (B, 3, S, S)."""
        return torch.as_tensor(self.pixels).permute(0, 3, 1, 2)


def _begin_worker(_: int) -> None:
    """Make this process a worker: it ignores signals, and exits when its parent dies.

    Ctrl-C reaches every process of the terminal, and a worker that ended would keep the trainer from its checkpoint.
    Torch's worker would wait for ever for a dead parent to take a batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _kill(workers: list[BaseProcess]) -> None:
    """Kill workers. They ignore SIGTERM, and at its end Python would wait for one that reads from a dead disk."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None  # the loader's would raise
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(WAIT)
    if is_main:
        signal.signal(signal.SIGCHLD, handler)


class PixelSource:
    """Batches of pixels from image files or their cache, read in `workers` processes and flipped on `device`.

    A cached array is read in this process: copying it is faster than sending it from another.
    """

    def __init__(self, files: ImageFiles | CachedImages, workers: int, device: torch.device) -> None:
        self.files, self.device = files, device
        self.workers = 0 if isinstance(files, CachedImages) and files.cache.pixels is not None else workers
        self.unreadable = dict(files.unreadable)
        """What is wrong with each image that is known to be unreadable, by number. It is black in its batch."""
        self.on_wait: Callable[[int], None] = self.say_waiting
        """Called with the seconds for which no batch has come."""

    @staticmethod
    def say_waiting(seconds: int) -> None:
        """Warn, once, that the images do not come."""
        if seconds == WARN_AFTER:
            print(f"no image was read for {seconds} s: does the disk or network folder answer?", file=sys.stderr)

    def batches(self, requests: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Tensor]:
        """For each request (image numbers, flips), both (B,): uint8 pixels (B, 3, S, S) on the device."""
        loader = DataLoader(
            self.files,
            batch_sampler=[numbers.tolist() for numbers, _ in requests],
            collate_fn=_Sent,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            timeout=WAIT if self.workers else 0,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # the default one serves dropout, which must not depend on the loader
        )
        in_thread = self.workers == 0 and self.device.type == "cuda"  # else the GPU waits for this process to read
        batches = prefetch(loader) if in_thread else self._received(loader)
        for batch, (_, flips) in zip(batches, requests, strict=True):
            self._note(batch.unreadable)
            yield self._flipped(batch.tensor(), flips)

    def _received(self, loader: DataLoader) -> Iterator[_Sent]:
        """The loader's batches. While none comes, `on_wait` is called every WAIT seconds."""
        others = active_children()
        try:
            batches = iter(loader)
        except (OSError, ImportError) as error:
            no_processes(error)
        waited = 0
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if "timed out" not in str(error):
                        raise
                    waited += WAIT
                    self.on_wait(waited)
                else:
                    waited = 0
                    yield batch
        except BaseException:
            _kill([process for process in active_children() if process not in others])
            raise

    def load(self, numbers: np.ndarray, flips: np.ndarray) -> Tensor:
        """One batch as those of `batches`, decoded in this process."""
        pixels, unreadable = self.files.__getitems__(numbers.tolist())
        self._note(unreadable)
        return self._flipped(pixels, flips)

    def _note(self, unreadable: dict[int, str]) -> None:
        """Note unreadable images. A damaged cache ends the reading: it can be made again."""
        if unreadable and isinstance(self.files, CachedImages):
            raise UserError(unreadable[min(unreadable)])
        self.unreadable |= unreadable

    def _flipped(self, pixels: Tensor, flips: np.ndarray) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        is_flipped = to_device(flips, self.device)[:, None, None, None]
        return torch.where(is_flipped, pixels.flip(3), pixels)


class FeatureSource:
    """Batches of a frozen backbone's cached features; `features` is (I, 2, F), image and flipped image."""

    def __init__(
        self,
        features: np.ndarray | CheckedRows,
        device: torch.device,
        unreadable: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.features, self.device = features, device
        self.unreadable = unreadable
        """What was wrong with each image that was unreadable when the features were computed, by number."""

    def batches(self, requests: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Tensor]:
        """For each request (image numbers, flips), both (B,): features (B, F) on the device."""
        return (self.load(numbers, flips) for numbers, flips in requests)

    def load(self, numbers: np.ndarray, flips: np.ndarray) -> Tensor:
        """One batch."""
        features = self.features[numbers, flips.astype(np.int64)]
        if self.unreadable:
            features[np.isin(numbers, list(self.unreadable))] = 0  # NaN would reach the gradients of all others
        return to_device(features, self.device)


ImageSource = PixelSource | FeatureSource


def demand_readable(unreadable: Mapping[int, str], images: int, share: float = 0.0) -> None:
    """Raise UserError, with a summary, where more than `share` of a dataset's `images` could not be read."""
    if len(unreadable) > share * images:
        first = unreadable[min(unreadable)]
        allowed = f"training.max_unreadable_share allows {share:.2%}" if share else "none may be missing here"
        others = f" (the first of {len(unreadable):,} of {images:,} images, {len(unreadable) / images:.2%}; {allowed})"
        raise UserError(f"{first}{others if share or len(unreadable) > 1 else ''}; run prepare_dataset.py again")
