"""Batches of pixels or cached features, from files or a pixel cache."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets import T
from images.files import UnreadableImage, load_image
from images.pixel_cache import PixelCache, no_longer_readable
from pipeline.devices import to_device
from pipeline.errors import UserError
from pipeline.pairs import Images


class ImageFiles(Dataset[tuple[Tensor, dict[int, str]]]):
    """Image files, decoded as they are asked for, S x S pixels."""

    def __init__(
        self,
        images: Images,
        size: int,
        max_pixels: int,
        describe: Callable[[Path, UnreadableImage], str] = no_longer_readable,
    ) -> None:
        self.images, self.size, self.max_pixels, self.describe = images, size, max_pixels, describe
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, dict[int, str]]:
        """A batch (B, 3, S, S), and by number what is wrong with the files that cannot be read: black in the batch.

        It is returned because an exception that a worker raises comes with the worker's traceback in its message.
        """
        pixels, unreadable = np.zeros((len(numbers), self.size, self.size, 3), dtype=np.uint8), {}
        for line, number in enumerate(numbers):
            path = self.images.root / self.images.paths[number]
            try:
                pixels[line] = load_image(path, size=self.size, max_pixels=self.max_pixels)
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
        """As `ImageFiles`; what cannot be read is known beforehand, but for what is lost since."""
        pixels, lost = self.cache.batch(numbers)
        return _channels_first(pixels), lost


def _channels_first(pixels: np.ndarray) -> Tensor:
    """(B, S, S, 3) as (B, 3, S, S), in PyTorch's memory format channels_last: nothing is moved."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _ahead(batches: Iterable[T], count: int = 3) -> Iterator[T]:
    """The same, so many taken ahead by a thread."""
    with ThreadPoolExecutor(1) as thread:
        rest, end = iter(batches), object()
        waiting = deque(thread.submit(next, rest, end) for _ in range(count))
        while (batch := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, rest, end))
            yield batch


def _as_it_comes(batch: tuple[Tensor, dict[int, str]]) -> tuple[Tensor, dict[int, str]]:
    return batch


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches every process of the terminal: a worker that heeds it would take the last checkpoint with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class PixelSource:
    """Batches of pixels from image files or their cache, read in `workers` processes and mirrored on `device`.

    An array of pixels is read here: to hand them from process to process takes longer than to copy them.
    """

    def __init__(self, files: ImageFiles | CachedImages, workers: int, device: torch.device) -> None:
        self.files, self.device = files, device
        self.workers = 0 if isinstance(files, CachedImages) and files.cache.pixels is not None else workers
        self.unreadable = dict(files.unreadable)
        """What is wrong with each image, by number, that is known not to be readable; black in its batch."""

    def batches(self, requests: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Tensor]:
        """For each request (image numbers, flips), both (B,): uint8 pixels (B, 3, S, S) on the device."""
        loader = DataLoader(
            self.files,
            batch_sampler=[numbers.tolist() for numbers, _ in requests],
            collate_fn=_as_it_comes,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # torch's own is for dropout, whose draws must not depend on the loader
        )
        ahead = self.workers == 0 and self.device.type == "cuda"  # a GPU is not to wait for what is read here
        for (pixels, unreadable), (_, flips) in zip(_ahead(loader) if ahead else loader, requests, strict=True):
            self.unreadable |= unreadable
            yield self._mirrored(pixels, flips)

    def load(self, numbers: np.ndarray, flips: np.ndarray) -> Tensor:
        """One batch more, as those of `batches`, decoded in this process."""
        pixels, unreadable = self.files.__getitems__(numbers.tolist())
        self.unreadable |= unreadable
        return self._mirrored(pixels, flips)

    def _mirrored(self, pixels: Tensor, flips: np.ndarray) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        mirrored = to_device(flips, self.device)[:, None, None, None]
        return torch.where(mirrored, pixels.flip(3), pixels)


class FeatureSource:
    """Batches of a frozen backbone's cached features; `features` is (I, 2, F), image and mirror image."""

    def __init__(
        self, features: np.ndarray, device: torch.device, unreadable: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self.features, self.device = features, device
        self.unreadable = unreadable
        """What was wrong with each image, by number, that could not be read when the features were computed."""

    def batches(self, requests: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Tensor]:
        """For each request (image numbers, flips), both (B,): features (B, F) on the device."""
        return (self.load(numbers, flips) for numbers, flips in requests)

    def load(self, numbers: np.ndarray, flips: np.ndarray) -> Tensor:
        """One batch."""
        return to_device(self.features[numbers, flips.astype(np.int64)], self.device)


ImageSource = PixelSource | FeatureSource


def demand_readable(unreadable: Mapping[int, str], images: int, share: float = 0.0) -> None:
    """Raise UserError, with a summary, where more than `share` of a dataset's `images` could not be read."""
    if len(unreadable) > share * images:
        first = unreadable[min(unreadable)]
        allowed = f"training.max_unreadable_share allows {share:.2%}" if share else "none may be missing here"
        others = f" (the first of {len(unreadable):,} of {images:,} images, {len(unreadable) / images:.2%}; {allowed})"
        raise UserError(f"{first}{others if share or len(unreadable) > 1 else ''}; run prepare_dataset.py again")
