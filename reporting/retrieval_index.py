"""The index of a run's dataset: the embeddings of all its images and texts, made once, and the nearest of them.

RUN/index holds images.npy and texts.npy (float32, items x dimensions, of PVSE items x embeddings x dimensions, unit
vectors), image_pairs.npy and text_pairs.npy (int64, the pair of each; of an image that several pairs share, the first),
and index.json, which says what they were made from. An image of several texts is in it once. Texts without a known word
are not in it; their images are.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datasets import load_prepared
from metrics import nearest
from pipeline.errors import UserError
from pipeline.files import fingerprint, read_array, read_json, write_array, write_json
from pipeline.pairs import SPLITS, Images, load_images, read_pairs
from text_space.tokenizer import SPECIAL_WORDS
from training.embedding import embed_images, embed_texts, image_source, made_from
from training.encoder import MODEL_INPUTS, RunEncoder

NAMES = ("images", "texts", "image_pairs", "text_pairs")
EXPLAINED = 5
"""Unknown words of a query that near ones are looked up for: of a large vocabulary this takes half a second a word."""


@dataclass(frozen=True)
class Items:
    """The images or the texts of an index. N items."""

    vectors: np.ndarray
    """(N, D), or (N, K, D) of PVSE, float32 unit vectors, memory-mapped."""
    pairs: np.ndarray
    """(N,) int64, the pair of each, ascending."""
    splits: np.ndarray
    """(N,) int8, number of its split in SPLITS."""

    def nearest(self, query: np.ndarray, top: int, split: str | None = None) -> list[tuple[int, float]]:
        """The `top` items most like a query (D,) or (K, D), as places and cosine similarities, the likest first.

        Of PVSE, that of the closest of the K x K pairs of vectors (metrics.py). Ties stand in the order of the pairs.
        With `split`, only that split's items.
        """
        return nearest(self.vectors, query, top, None if split is None else self.splits == SPLITS.index(split))


@dataclass(frozen=True)
class Index:
    """The embedded images and texts of a run's dataset, and the pairs they belong to."""

    images: Items
    texts: Items
    table: pa.Table
    """The pair table: a row's number is the pair's."""
    files: Images
    texts_of_image: np.ndarray
    """(I,) int64, by image number, how many pairs share it."""

    def items(self, kind: str) -> Items:
        """Its `images` or `texts`."""
        return {"images": self.images, "texts": self.texts}[kind]

    def describe(self, pair: int) -> dict[str, Any]:
        """The pair's number, split, image path and text, and how many texts its image has."""
        row = self.table.slice(pair, 1).to_pylist()[0]
        texts = int(self.texts_of_image[self.files.of_pair[pair]])
        path = str(self.files.root / row["image_path"])
        return {"pair": pair, "split": row["split"], "path": path, "text": row["text"], "texts_of_image": texts}

    def holds_image(self, pair: int) -> bool:
        """Whether that pair stands for an image of the index."""
        if not 0 <= pair < len(self.table):  # and so no number that numpy could not hold
            return False
        place = int(np.searchsorted(self.images.pairs, pair))
        return place < len(self.images.pairs) and int(self.images.pairs[place]) == pair


def open_index(encoder: RunEncoder) -> Index:
    """The index of the encoder's run, made now where it is not there or was made from something that has changed.

    An image that has become unreadable is left out of it. Raises UserError where one is missing.
    """
    folder, settings = encoder.run / "index", encoder.settings
    stamp, paths = folder / "index.json", {name: folder / f"{name}.npy" for name in NAMES}
    files = load_images(settings.work_folder)
    inputs: dict[str, object] = {
        "checkpoint": fingerprint(encoder.run / "best.pt"),
        "images": made_from(settings, files),
        **{name: fingerprint(settings.work_folder / name) for name in MODEL_INPUTS},
    }
    if not (stamp.exists() and read_json(stamp) == inputs and all(path.is_file() for path in paths.values())):
        stamp.unlink(missing_ok=True)
        for name, array in _embed(encoder).items():
            write_array(paths[name], array)
        write_json(stamp, inputs)
        print(f"wrote {folder}")
    arrays = {name: read_array(path) for name, path in paths.items()}
    table = read_pairs(settings.work_folder, ["image_path", "text", "split"])
    split_of_pair = np.zeros(len(table), dtype=np.int8)
    names = table["split"].to_numpy(zero_copy_only=False)
    for number, split in enumerate(SPLITS):
        split_of_pair[names == split] = number
    images, texts = (
        Items(arrays[kind], np.array(arrays[f"{kind[:-1]}_pairs"]), split_of_pair[arrays[f"{kind[:-1]}_pairs"]])
        for kind in ("images", "texts")
    )
    return Index(images, texts, table, files, np.bincount(files.of_pair))


def _embed(encoder: RunEncoder) -> Mapping[str, np.ndarray]:
    settings, model, device = encoder.settings, encoder.model, encoder.device
    data = load_prepared(settings)
    numbers, first_pairs = np.unique(data.images.of_pair, return_index=True)
    by_pair = np.argsort(first_pairs, kind="stable")
    numbers, first_pairs = numbers[by_pair], first_pairs[by_pair]
    with_words = np.flatnonzero(np.diff(data.offsets) > 0)
    print(f"indexing {len(numbers):,} images and {len(with_words):,} texts")
    source = image_source(settings, data, device, for_one_pass=True)
    images = embed_images(model, source, numbers, settings, device).cpu().numpy()
    if source.unreadable:
        count, why = len(source.unreadable), source.unreadable[min(source.unreadable)]
        print(f"left out: {count:,} images that cannot be read, the first being {why}")
        readable = ~np.isin(numbers, list(source.unreadable))
        images, first_pairs = images[readable], first_pairs[readable]
    arrays = {
        "images": images,
        "texts": embed_texts(model, data, with_words, settings, device).cpu().numpy(),
        "image_pairs": first_pairs.astype(np.int64),
        "text_pairs": with_words.astype(np.int64),
    }
    for kind in ("images", "texts"):
        if not np.isfinite(arrays[kind]).all():
            raise UserError(f"{encoder.run / 'best.pt'} gives {kind} embeddings that are not numbers; train it anew")
    return arrays


# Answers


def answer_text(encoder: RunEncoder, index: Index, text: str, top: int, split: str | None = None) -> dict[str, Any]:
    """The images most like a text: what `search.py --json` prints.

    Raises UserError where no word of it is in the vocabulary, naming near ones that are.
    """
    known, unknown = encoder.words(text)
    if not known and not unknown:
        raise UserError("the query has no word: stop words and short words do not count, as in training")
    near = {word: near_words(word, encoder.vocabulary) for word in unknown[:EXPLAINED]}
    if not known:
        count = len(encoder.vocabulary) - len(SPECIAL_WORDS)
        raise UserError(f"no word of the query is in the run's vocabulary of {count:,} words: {explained(near)}")
    (query,), _ = encoder.texts([text])
    asked = {"text": text, "words": known, "ignored_words": unknown, "near_words": near}
    return {"query": asked, **found_by(index, query, ("images",), top, split)}


def answer_image(
    encoder: RunEncoder, index: Index, path: Path | str, top: int, split: str | None = None, **limits: int
) -> dict[str, Any]:
    """The texts and the images most like an image file: what `search.py --json` prints.

    `limits` is `max_pixels`, if given. Raises UserError where the file cannot be read.
    """
    (query,), problems = encoder.images([path], **limits)
    if problems:
        raise UserError(f"{path} is no image that can be read: {problems[0]}")
    return {"query": {"image": str(path)}, **found_by(index, query, ("texts", "images"), top, split)}


def answer_pair(index: Index, pair: int, top: int, split: str | None = None) -> dict[str, Any]:
    """`answer_image` of an image of the index, by its pair. Raises KeyError where the index has no such image."""
    if not index.holds_image(pair):
        raise KeyError(pair)
    query = np.array(index.images.vectors[np.searchsorted(index.images.pairs, pair)])
    return {"query": {"pair": pair}, **found_by(index, query, ("texts", "images"), top, split)}


def found_by(
    index: Index, query: np.ndarray, kinds: tuple[str, ...], top: int, split: str | None = None
) -> dict[str, str | list[dict[str, Any]]]:
    """The items of these kinds, `images` and `texts`, most like a query (D,) or (K, D), as the answers have them."""
    found: dict[str, str | list[dict[str, Any]]] = {"score": "cosine similarity", "split": split or "all"}
    for kind in kinds:
        items = index.items(kind)
        nearest = items.nearest(query, top, split)
        found[kind] = [
            {"rank": rank, "score": round(score, 6), **index.describe(int(items.pairs[place]))}
            for rank, (place, score) in enumerate(nearest, start=1)
        ]
    return found


def near_words(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """Up to three words of the vocabulary that are spelt like `word`, the likest first."""
    near = difflib.get_close_matches(word, vocabulary, n=3, cutoff=0.7)
    return [other for other in near if other not in SPECIAL_WORDS]


def explained(near: Mapping[str, list[str]]) -> str:
    """Unknown words, each with the near ones that are known."""
    return ", ".join(f"{word} (near it: {', '.join(others)})" if others else word for word, others in near.items())
