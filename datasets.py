"""From the prepared files in WORK to batches: which pairs and neighbors, their token arrays, their images."""

import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from artifacts import FIND_NEIGHBORS, output_paths, read_array
from config import Settings, UserError
from images import UnreadableImage, load_image
from pairs import SPLITS, Images, distinct, load_images, read_pairs, rows_of_split
from pixel_cache import PixelCache, no_longer_readable


@dataclass(kw_only=True)
class WordSequences:
    """Texts as word numbers. N texts."""

    tokens: np.ndarray
    """(T,) int32, all word sequences one after the other."""
    offsets: np.ndarray
    """(N + 1,) int64, where each text's words begin in `tokens`."""
    max_words: int | None = None
    """Words of a text that are read, from its beginning; None reads all."""

    def texts(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Words of `rows`: (B, L) int64 padded with 0, and (B,) lengths."""
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        if self.max_words:
            ends = np.minimum(ends, starts + 1 + self.max_words)  # <start> is no word
        lengths = ends - starts
        padded = np.zeros((len(rows), max(int(lengths.max(initial=1)), 1)), dtype=np.int64)
        for line, (start, end) in enumerate(zip(starts, ends, strict=True)):
            padded[line, : end - start] = self.tokens[start:end]
        return torch.from_numpy(padded), torch.from_numpy(lengths)


@dataclass(kw_only=True)
class Prepared(WordSequences):
    """What steps 0 to 2 prepared. N pairs."""

    images: Images
    image_ids: np.ndarray
    """(N,) int64, equal where pairs share an `image_id`."""
    categories: np.ndarray
    """(N,) int64, number in `category_names`, -1 where a pair has none."""
    category_names: list[str]
    rows: dict[str, np.ndarray]
    """Pair numbers (int64) of each split that can be used: those whose text has a known word."""
    unused: dict[str, int]
    """Pairs of each split without a known word."""


def load_prepared(settings: Settings) -> Prepared:
    """Map the prepared files.

    Raises UserError where they are missing, a split has no pair that can be used, or val or test those of one image.
    """
    work = settings.work_folder
    table = read_pairs(work, ["image_id", "category", "split"])
    offsets = read_array(work / "doc2vec" / "offsets.npy")
    has_words = np.diff(offsets) > 0
    split_rows = {split: rows_of_split(table, split) for split in SPLITS}
    rows = {split: numbers[has_words[numbers]] for split, numbers in split_rows.items()}
    for split, numbers in rows.items():
        if not len(numbers):
            raise UserError(f"no pair of split {split} in {work} has a word of the vocabulary; lower doc2vec.min_count")
    image_ids = distinct(table["image_id"])[0]
    for split in ("val", "test"):
        if len(np.unique(image_ids[rows[split]])) < 2:
            raise UserError(
                f"one image only of split {split} in {work} has a text with a word of the vocabulary, and retrieval "
                "takes two; lower doc2vec.min_count, or prepare more pairs"
            )
    categories, category_names = distinct(table["category"].fill_null(""))
    if "" in category_names:
        null = category_names.index("")
        categories = np.where(categories == null, -1, categories - (categories > null))
        category_names.remove("")
    return Prepared(
        images=load_images(work),
        image_ids=image_ids,
        categories=categories,
        category_names=category_names,
        tokens=read_array(work / "doc2vec" / "tokens.npy"),
        offsets=offsets,
        rows=rows,
        unused={split: len(split_rows[split]) - len(rows[split]) for split in SPLITS},
        max_words=settings.model.text.max_words,
    )


class Neighbors:
    """The neighbor table of the train pairs, and the draw of a positive from it: Psi of Eq. 5."""

    def __init__(self, settings: Settings, data: Prepared) -> None:
        rows, indices, _ = (read_array(path) for path in output_paths(FIND_NEIGHBORS, settings))
        if not np.array_equal(rows, data.rows["train"]):
            raise UserError(
                f"{settings.work_folder} has neighbors of other train pairs; run {FIND_NEIGHBORS.script} again"
            )
        self.indices = indices[:, : settings.neighbors.draw_from]
        self.rows = data.rows["train"]
        self.anywhere = self.rows if settings.neighbors.draw == "anywhere" else None
        self.image_ids = data.image_ids

    def draw(self, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One pair number (int64) for each train pair, given by its position in the table; -1 where it has none.

        Uniform over the pair's neighbors or, as a control (`neighbors.draw: anywhere`), over all other train pairs.
        """
        if self.anywhere is None:
            count = (self.indices[positions] >= 0).sum(axis=1)
            choice = (rng.random(len(positions)) * count).astype(np.int64)
            return np.where(
                count > 0, self.indices[positions, np.minimum(choice, np.maximum(count - 1, 0))], -1
            ).astype(np.int64)
        own = self.anywhere[positions]
        drawn = rng.choice(self.anywhere, size=len(positions))
        for _ in range(100):
            same = self.image_ids[drawn] == self.image_ids[own]
            if not same.any():
                return drawn
            drawn[same] = rng.choice(self.anywhere, size=int(same.sum()))
        return np.where(self.image_ids[drawn] == self.image_ids[own], -1, drawn)

    def contain(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """(B, M) bool: is the train pair `candidates[j]` among the neighbors of the train pair `rows[i]`?"""
        lists = self.indices[np.searchsorted(self.rows, rows)]
        return np.stack([np.isin(candidates, neighbors) for neighbors in lists])


class OtherTexts:
    """Ground-truth neighbors: the other texts of a train pair's own image, as STRUC has them."""

    def __init__(self, data: Prepared) -> None:
        rows = data.rows["train"]
        _, image, self.counts = np.unique(data.image_ids[rows], return_inverse=True, return_counts=True)
        if self.counts.max() < 2:
            raise UserError("loss.structure ground_truth needs several texts an image; this dataset has one of each")
        order = np.argsort(image, kind="stable")
        self.by_image, self.image = rows[order], image
        self.first = np.cumsum(self.counts) - self.counts
        self.rank = np.empty(len(rows), dtype=np.int64)
        self.rank[order] = np.arange(len(rows)) - self.first[image[order]]

    def draw(self, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One pair number (int64) for each train pair, given by its position; -1 where its image has one text."""
        image = self.image[positions]
        count = self.counts[image]
        step = 1 + (rng.random(len(positions)) * (count - 1)).astype(np.int64)  # never all the way round
        drawn = self.by_image[self.first[image] + (self.rank[positions] + step) % count]
        return np.where(count > 1, drawn, -1)


@dataclass
class BatchPlan:
    """One minibatch before anything is loaded: pair numbers, and whether each image is mirrored. B pairs."""

    rows: np.ndarray
    """(B,) int64, pairs."""
    neighbors: np.ndarray
    """(B,) int64, drawn neighbor pairs; -1 where a pair has none."""
    flips: np.ndarray
    """(B,) bool."""
    neighbor_flips: np.ndarray
    """(B,) bool."""


def plan_epoch(
    rows: np.ndarray, neighbors: Neighbors | OtherTexts | None, batch_size: int, *, flip: bool, seed: int, epoch: int
) -> list[BatchPlan]:
    """All minibatches of an epoch: each train pair once, in random order, each with a neighbor drawn afresh.

    Everything random is drawn here, from `seed` and `epoch` alone, so that a batch is the same whatever came before it:
    a resumed run goes on as if it had never stopped. A last pair that would be alone joins the batch before: it has no
    negatives, and batch normalisation nothing to normalise over.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(rows))
    drawn = neighbors.draw(order, rng) if neighbors else np.full(len(rows), -1)
    flips = rng.random((2, len(rows))) < (0.5 if flip else 0.0)
    starts = list(range(0, len(rows), batch_size))
    if batch_size > 1 and len(starts) > 1 and len(rows) - starts[-1] == 1:
        starts.pop()
    return [
        BatchPlan(rows[order[part]], drawn[part], flips[0, part], flips[1, part])
        for part in map(slice, starts, [*starts[1:], len(rows)])
    ]


# Images


class ImageFiles(Dataset[tuple[Tensor, dict[int, str]]]):
    """Image files, decoded as they are asked for, S x S pixels."""

    def __init__(self, images: Images, size: int, max_pixels: int) -> None:
        self.images, self.size, self.max_pixels = images, size, max_pixels
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
                unreadable[number] = no_longer_readable(path, error)
        return _channels_first(pixels), unreadable


class CachedImages(Dataset[tuple[Tensor, dict[int, str]]]):
    """Images from a pixel cache."""

    def __init__(self, cache: PixelCache) -> None:
        self.cache = cache
        self.unreadable = cache.unreadable

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, dict[int, str]]:
        """As `ImageFiles`; what cannot be read is known beforehand."""
        return _channels_first(self.cache.batch(numbers)), {}


def _channels_first(pixels: np.ndarray) -> Tensor:
    """(B, S, S, 3) as (B, 3, S, S), in PyTorch's memory format channels_last: nothing is moved."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _as_it_comes(batch: tuple[Tensor, dict[int, str]]) -> tuple[Tensor, dict[int, str]]:
    return batch


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches every process of the terminal: a worker that heeds it would take the last checkpoint with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class PixelSource:
    """Batches of pixels from image files or their cache, read in `workers` processes and mirrored on `device`."""

    def __init__(self, files: ImageFiles | CachedImages, workers: int, device: torch.device) -> None:
        self.files, self.workers, self.device = files, workers, device
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
        for (pixels, unreadable), (_, flips) in zip(loader, requests, strict=True):
            self.unreadable |= unreadable
            yield self._mirrored(pixels, flips)

    def load(self, numbers: np.ndarray, flips: np.ndarray) -> Tensor:
        """One batch more, as those of `batches`, decoded in this process."""
        pixels, unreadable = self.files.__getitems__(numbers.tolist())
        self.unreadable |= unreadable
        return self._mirrored(pixels, flips)

    def _mirrored(self, pixels: Tensor, flips: np.ndarray) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        mirrored = torch.from_numpy(flips).to(self.device)[:, None, None, None]
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
        return torch.from_numpy(self.features[numbers, flips.astype(np.int64)]).to(self.device)


ImageSource = PixelSource | FeatureSource


def demand_readable(unreadable: Mapping[int, str], images: int, share: float = 0.0) -> None:
    """Raise UserError, with a summary, where more than `share` of a dataset's `images` could not be read."""
    if len(unreadable) > share * images:
        first = unreadable[min(unreadable)]
        allowed = f"training.max_unreadable_share allows {share:.2%}" if share else "none may be missing here"
        others = f" (the first of {len(unreadable):,} of {images:,} images, {len(unreadable) / images:.2%}; {allowed})"
        raise UserError(f"{first}{others if share or len(unreadable) > 1 else ''}; run prepare_dataset.py again")
