"""From the prepared files in WORK to batches: which pairs and neighbors, their token arrays, their images."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import read_array
from pipeline.pairs import SPLITS, Images, distinct, load_images, read_pairs, rows_of_split
from pipeline.schema import Neighbors
from pipeline.steps import FIND_NEIGHBORS
from pipeline.work import NeighborFiles, Work


@dataclass(kw_only=True)
class WordSequences:
    """Texts as word numbers. N texts."""

    tokens: np.ndarray
    """(T,) int32, all word sequences one after the other."""
    offsets: np.ndarray
    """(N + 1,) int64, where each text's words begin in `tokens`."""
    max_words: int | None = None
    """Words of a text that are read, from its beginning; None reads all."""

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the words of `rows` (B,) that are read begin and end in `tokens`: (B,) each."""
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        if self.max_words:
            ends = np.minimum(ends, starts + 1 + self.max_words)  # <start> is no word
        return starts, ends

    def texts(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Words of `rows`: (B, L) int64 padded with 0, and (B,) lengths."""
        starts, ends = self.bounds(rows)
        lengths = ends - starts
        padded = np.zeros((len(rows), max(int(lengths.max(initial=1)), 1)), dtype=np.int64)
        for line, (start, end) in enumerate(zip(starts, ends, strict=True)):
            padded[line, : end - start] = self.tokens[start:end]
        return torch.from_numpy(padded), torch.from_numpy(lengths)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """The number of words (B,) of `rows` (B,)."""
        return np.diff(self.offsets)[rows]

    def contents(self, rows: np.ndarray) -> Iterator[bytes]:
        """What the encoder reads of each of `rows` (B,): equal where it is the same."""
        for start, end in zip(*(bound.tolist() for bound in self.bounds(rows)), strict=True):
            yield self.tokens[start:end].tobytes()


@dataclass
class TextVectors:
    """Texts as vectors that were computed before. N texts."""

    vectors: np.ndarray
    """(N, F) float32."""

    def texts(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Vectors of `rows`: (B, F) float32, and (B,) lengths, all 1."""
        return torch.from_numpy(np.array(self.vectors[rows])), torch.ones(len(rows), dtype=torch.int64)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """(B,), all 1."""
        return np.ones(len(rows), dtype=np.int64)

    def contents(self, rows: np.ndarray) -> Iterator[bytes]:
        """As of word sequences."""
        return (hashlib.blake2b(self.vectors[row].tobytes(), digest_size=16).digest() for row in rows)


TextInputs = WordSequences | TextVectors
"""Texts as a text encoder reads them."""


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
    inputs: TextInputs | None = None
    """What the text encoder reads of all pairs, where that is not their words."""

    @property
    def read(self) -> TextInputs:
        """What the text encoder reads: the pairs' words, or what takes their place."""
        return self if self.inputs is None else self.inputs


def load_prepared(work: Path, max_words: int | None) -> Prepared:
    """Map the prepared files in WORK. Of each text the first `max_words` words are read, all where it is None.

    Raises UserError where files are missing, a split has no usable pair, or val or test has usable pairs of one image
    only.
    """
    table = read_pairs(work, ["image_id", "category", "split"])
    offsets = read_array(Work(work).offsets)
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
        tokens=read_array(Work(work).tokens),
        offsets=offsets,
        rows=rows,
        unused={split: len(split_rows[split]) - len(rows[split]) for split in SPLITS},
        max_words=max_words,
    )


@dataclass
class NeighborTable:
    """The neighbors of the R train pairs, and the draw of a positive from them: Psi of Eq. 5."""

    rows: np.ndarray
    """(R,) the train pairs, ascending."""
    indices: np.ndarray
    """(R, k) their neighbors' pair numbers, the nearest first, -1 where there are fewer."""
    image_ids: np.ndarray
    """(N,) int64, equal where pairs share an `image_id`."""
    anywhere: bool = False
    """Whether, as a control, positives are drawn from all train pairs (`neighbors.draw: anywhere`)."""

    def draw(self, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One pair number (int64) for each train pair, given by its position in the table; -1 where it has none.

        Uniform over the pair's neighbors or, as a control (`neighbors.draw: anywhere`), over all other train pairs.
        """
        if not self.anywhere:
            lists = (self.indices[part] for part in _blocks(positions))
            return np.concatenate([_one_of(some, some >= 0, rng) for some in lists])
        own = self.rows[positions]
        drawn = rng.choice(self.rows, size=len(positions))
        for _ in range(100):
            same = self.image_ids[drawn] == self.image_ids[own]
            if not same.any():
                return drawn
            drawn[same] = rng.choice(self.rows, size=int(same.sum()))
        return np.where(self.image_ids[drawn] == self.image_ids[own], -1, drawn)

    def is_listed(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """(B, M) bool: is the train pair `candidates[j]` among the neighbors of the train pair `rows[i]`?"""
        return are_listed(candidates, self.indices[np.searchsorted(self.rows, rows)])

    def match(self, rng: np.random.Generator) -> np.ndarray:
        """A random matching: the position of each train pair's partner, (R,) int64, its own where it stays single.

        Pairs choose in random order. A pair without a partner chooses one of its neighbors without a partner, each
        equally likely. A block of pairs chooses at once. Where several choose the same pair the first in order gets
        it, and the others choose again.
        """
        partner = np.full(self.rows[-1] + 2, -1)  # by pair number
        partner[-1] = 0  # what fills up a list is never free
        turn_of = np.empty_like(partner)
        for asking in _blocks(rng.permutation(len(self.rows))):
            while len(asking):
                asking = asking[partner[self.rows[asking]] < 0]
                lists = self.indices[asking]
                asked = _one_of(lists, partner[lists] < 0, rng)
                asking, asked = asking[asked >= 0], asked[asked >= 0]
                couples, turns = np.stack([self.rows[asking], asked], axis=1), np.arange(len(asking))[:, None]
                turn_of[couples[::-1]] = turns[::-1]  # of several turns the last that is written stays, the first
                agreed = (turn_of[couples] == turns).all(axis=1)
                partner[couples[agreed]] = couples[agreed, ::-1]
                asking = asking[~agreed]
        of_row = partner[self.rows]
        return np.searchsorted(self.rows, np.where(of_row < 0, self.rows, of_row))

    def draw_within(self, positions: np.ndarray, batches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a neighbor in the same batch for each train pair: pair numbers (R,) int64, -1 where there is none.

        Every neighbor in the batch is equally likely. positions: (R,), the pairs. batches: (R,) int64, their batches.
        """
        batch_of = np.full(self.rows[-1] + 2, -1)  # by pair number
        batch_of[self.rows[positions]] = batches
        parts = zip(_blocks(positions), _blocks(batches), strict=True)
        return np.concatenate(
            [
                _one_of(lists, batch_of[lists] == batch[:, None], rng)
                for lists, batch in ((self.indices[part], batch) for part, batch in parts)
            ]
        )


def load_neighbors(work: Path, settings: Neighbors, data: Prepared) -> NeighborTable:
    """The neighbor table of `neighbors.space` in WORK. Raises UserError as `read_neighbors`."""
    train, anywhere = data.rows["train"], settings.draw == "anywhere"
    indices = read_neighbors(Work(work).neighbors(settings.space), train)[:, : settings.draw_from]
    if anywhere:
        indices = other_pairs(indices, train, data.image_ids)
    return NeighborTable(train, indices, data.image_ids, anywhere)


def other_pairs(indices: np.ndarray, train: np.ndarray, image_ids: np.ndarray) -> np.ndarray:
    """A control for the neighbors `indices` (R, k) of the train pairs `train` (R,): as many random train pairs.

    They are of other images, and the same in every epoch and run. image_ids: (N,).
    """
    drawn = np.random.default_rng(0).choice(train, size=indices.shape)
    allowed = (indices >= 0) & (image_ids[drawn] != image_ids[train][:, None])
    return np.where(allowed, drawn, -1)


def read_neighbors(files: NeighborFiles, train: np.ndarray) -> np.ndarray:
    """Neighbors (R, k) of the train pairs `train` (R,). Raises UserError where the files are missing or of others."""
    if not np.array_equal(read_array(files.rows), train):
        raise UserError(f"{files.folder} has neighbors of other train pairs; run {FIND_NEIGHBORS.script} again")
    return read_array(files.indices)


def are_listed(candidates: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """(B, M) bool: which of the pairs `candidates` (M,) are in each of the `lists` (B, k)?"""
    distinct, of_candidate = np.unique(candidates, return_inverse=True)
    column = np.minimum(np.searchsorted(distinct, lists), len(distinct) - 1)
    line, entry = np.nonzero(distinct[column] == lists)
    found = np.zeros((len(lists), len(distinct)), dtype=bool)
    found[line, column[line, entry]] = True
    return found[:, of_candidate]


def _blocks(numbers: np.ndarray, size: int = 8192) -> Iterator[np.ndarray]:
    """`numbers` in parts so small that some (size, k) arrays take little memory."""
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _one_of(lists: np.ndarray, allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One entry (int64) of each line of `lists` that `allowed` allows, both (B, k), uniformly; -1 where none is."""
    counted = allowed.cumsum(axis=1, dtype=np.int32)
    count = counted[:, -1]
    choice = np.minimum((rng.random(len(lists)) * count).astype(np.int32), count - 1)
    column = (counted > choice[:, None]).argmax(axis=1)
    return np.where(count > 0, lists[np.arange(len(lists)), column], -1).astype(np.int64)


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
    """(B,) int64, drawn neighbor pairs, of neighborhood batches in `rows`; -1 where a pair has none."""
    flips: np.ndarray
    """(B,) bool."""
    neighbor_flips: np.ndarray
    """(B,) bool."""

    @property
    def positives(self) -> np.ndarray:
        """(B,) the drawn neighbors. A pair without one has itself here, and the losses mask it."""
        return np.where(self.neighbors >= 0, self.neighbors, self.rows)

    def part(self, places: slice) -> "BatchPlan":
        """Some of the pairs; it shares this plan's memory."""
        return BatchPlan(*(getattr(self, field.name)[places] for field in dataclasses.fields(self)))


def plan_epoch(
    rows: np.ndarray,
    neighbors: NeighborTable | OtherTexts | None,
    batch_size: int,
    *,
    flip: bool,
    seed: int,
    epoch: int,
    neighborhoods: bool = False,
    processes: int = 1,
) -> list[BatchPlan]:
    """All minibatches of an epoch: each train pair once, in random order, each with a newly drawn neighbor.

    All that is random is drawn here, from `seed` and `epoch` alone, so that a resumed run has the same batches. The
    last pairs join the batch before where they are fewer than two for each of the `processes` that share a batch: a
    single pair has no negatives.

    With `neighborhoods`, which is ours, each pair is matched with a neighbor. Such a couple shares a batch, and the
    drawn neighbors are of the same batch, so that no other image or text is loaded.
    """
    rng = np.random.default_rng([seed, epoch])
    table = neighbors if neighborhoods and isinstance(neighbors, NeighborTable) else None
    if table:
        order, starts = order_of_couples(table.match(rng), batch_size, rng)
    else:
        order, starts = rng.permutation(len(rows)), list(range(0, len(rows), batch_size))
    fewest = max(2 * processes, 3 if table else 2)
    if batch_size > 1 and len(starts) > 1 and len(rows) - starts[-1] < fewest:
        starts.pop()
    if table:
        sizes = np.diff([*starts, len(rows)])
        drawn = table.draw_within(order, np.repeat(np.arange(len(starts)), sizes), rng)
    else:
        drawn = neighbors.draw(order, rng) if neighbors else np.full(len(rows), -1)
    flips = rng.random((2, len(rows))) < (0.5 if flip else 0.0)
    return [
        BatchPlan(rows[order[part]], drawn[part], flips[0, part], flips[1, part])
        for part in map(slice, starts, [*starts[1:], len(rows)])
    ]


def order_of_couples(partner: np.ndarray, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Positions (R,) in random order, and where in it each batch begins. Couples stand together.

    A batch holds `batch_size` pairs, or one fewer where it would divide a couple. partner: (R,), as `match` returns.
    """
    first = rng.permutation(np.flatnonzero(partner >= np.arange(len(partner))))
    couples = np.stack([first, partner[first]], axis=1)
    there = np.stack([np.ones(len(first), dtype=bool), couples[:, 0] != couples[:, 1]], axis=1)
    ends, starts = there.sum(axis=1).cumsum(), [0]
    while len(partner) - starts[-1] > batch_size:
        starts.append(int(ends[np.searchsorted(ends, starts[-1] + batch_size, side="right") - 1]))
    return couples[there], starts
