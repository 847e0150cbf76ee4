"""The index of a run's dataset: embeddings of all its images and texts, computed once.

RUN/index holds:

- images.npy, texts.npy: (items, D), or (items, K, D) with PVSE, float32 unit vectors.
- image_pairs.npy, text_pairs.npy: (items,) int64, each item's pair; the first pair where several share an image.
- index.json: fingerprints of what the index was computed from, and of the arrays.

An image with several texts is in the index once. A text without a known word is not in it, where the text encoder
reads words; its image is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.files import fingerprint, is_whole, read_array, write_array, write_stamp
from pipeline.output import in_one_line
from pipeline.pairs import SPLITS, Images, load_images, read_pairs
from pipeline.work import Work
from ranking import nearest
from training.embedding import embed_texts, encode_images
from training.encoder import MODEL_INPUTS, RunEncoder, demand_work
from training.image_sources import image_source, made_from
from training.text_streams import load_pairs

ARRAYS = ("images", "texts", "image_pairs", "text_pairs")


@dataclass(frozen=True)
class EmbeddedItems:
    """The images or the texts of an index: N items, ordered by pair."""

    vectors: np.ndarray
    """(N, D), or (N, K, D) with PVSE, float32 unit vectors, memory-mapped."""
    pairs: np.ndarray
    """(N,) int64, pair numbers, ascending."""
    splits: np.ndarray
    """(N,) int8, each item's split as its position in SPLITS."""

    def nearest(self, query: np.ndarray, top: int, split: str | None = None) -> list[tuple[int, float]]:
        """Places and cosine similarities of the `top` items nearest to a query (D,) or (K, D), the nearest first.

        With PVSE the similarity is that of the closest of the K x K pairs of vectors. Equally near items stand in the
        order of their pairs. `split` restricts the search to one split.
        """
        return nearest(self.vectors, query, top, None if split is None else self.splits == SPLITS.index(split))


@dataclass(frozen=True)
class Index:
    """The embedded images and texts of a run's dataset, and their pairs. I image files."""

    images: EmbeddedItems
    texts: EmbeddedItems
    table: pa.Table
    """The pair table. A pair's number is its row."""
    files: Images
    texts_of_image: np.ndarray
    """(I,) int64, how many pairs share each image."""

    def items(self, kind: str) -> EmbeddedItems:
        """The `images` or the `texts`."""
        return {"images": self.images, "texts": self.texts}[kind]

    def describe(self, pair: int) -> dict[str, Any]:
        """The pair's number, split, image path and text, and how many texts its image has."""
        row = self.table.slice(pair, 1).to_pylist()[0]
        texts = int(self.texts_of_image[self.files.of_pair[pair]])
        path = str(self.files.root / row["image_path"])
        return {"pair": pair, "split": row["split"], "path": path, "text": row["text"], "texts_of_image": texts}

    def image_pair(self, pair: int) -> int | None:
        """The pair that the image of `pair` is indexed under: the first with that image. None where it is not."""
        first = int(np.argmax(self.files.of_pair == self.files.of_pair[pair]))
        return first if self.holds_image(first) else None

    def holds_image(self, pair: int) -> bool:
        """Whether an image is indexed under that pair."""
        if not 0 <= pair < len(self.table):  # also keeps out numbers too large for numpy
            return False
        place = int(np.searchsorted(self.images.pairs, pair))
        return place < len(self.images.pairs) and int(self.images.pairs[place]) == pair


def open_index(encoder: RunEncoder) -> Index:
    """The index of the encoder's run. It is built where there is none, rebuilt where it is damaged or an input changed.

    With `evaluation.expand` it holds expanded embeddings.

    An image that has become unreadable is left out. Raises UserError where an image file is missing.
    """
    folder, settings, evaluation = encoder.run / "index", encoder.settings, encoder.settings.evaluation
    demand_work(encoder.run, settings)
    stamp, paths = folder / "index.json", {name: folder / f"{name}.npy" for name in ARRAYS}
    files = load_images(settings.work_folder)
    inputs: dict[str, object] = {
        "checkpoint": fingerprint(encoder.run / "best.pt"),
        "images": made_from(settings.model.image, settings.seed, files),
        **{name: fingerprint(settings.work_folder / name) for name in MODEL_INPUTS},
    }
    if evaluation.expand:
        inputs |= {"expand": [evaluation.expand, evaluation.expand_neighbors]}
        inputs |= {"doc2vec/vectors.npy": fingerprint(Work(settings.work_folder).vectors)}
    if not is_whole(stamp, inputs, paths.values()):
        stamp.unlink(missing_ok=True)
        for name, array in _embed(encoder).items():
            write_array(paths[name], array)
        write_stamp(stamp, inputs, paths.values())
        print(f"wrote {folder}")
    arrays = {name: read_array(path) for name, path in paths.items()}
    table = read_pairs(settings.work_folder, ["image_path", "text", "split"])
    split_of_pair = np.zeros(len(table), dtype=np.int8)
    names = table["split"].to_numpy(zero_copy_only=False)
    for number, split in enumerate(SPLITS):
        split_of_pair[names == split] = number
    images, texts = (
        EmbeddedItems(arrays[kind], np.array(arrays[f"{kind[:-1]}_pairs"]), split_of_pair[arrays[f"{kind[:-1]}_pairs"]])
        for kind in ("images", "texts")
    )
    return Index(images, texts, table, files, np.bincount(files.of_pair))


def _embed(encoder: RunEncoder) -> dict[str, np.ndarray]:
    """The arrays of the index, by name in ARRAYS. Raises UserError where the model gives NaN or infinity."""
    settings, model, device = encoder.settings, encoder.model, encoder.device
    data = load_pairs(settings.work_folder, settings.features_folder, settings.model.text, device)
    numbers, first_pairs = np.unique(data.images.of_pair, return_index=True)
    by_pair = np.argsort(first_pairs, kind="stable")
    numbers, first_pairs = numbers[by_pair], first_pairs[by_pair]
    texts = np.flatnonzero(np.diff(data.offsets) > 0) if data.inputs is None else np.arange(len(data.image_ids))
    print(f"indexing {len(numbers):,} images and {len(texts):,} texts")
    source = image_source(settings, data, device, for_one_pass=True)
    size, precision = settings.evaluation.batch_size, settings.training.precision
    x = encode_images(model.eval().images, source, numbers, size, precision, device)
    y = embed_texts(model.texts, data.read, texts, size, precision, device)
    if encoder.expander:
        x, y = encoder.expander.images(x, numbers), encoder.expander.texts(y, texts)
    images = x.cpu().numpy()
    if source.unreadable:
        count, why = len(source.unreadable), source.unreadable[min(source.unreadable)]
        print(f"left out: {count:,} images that cannot be read, the first: {in_one_line(why)}")
        readable = ~np.isin(numbers, list(source.unreadable))
        images, first_pairs = images[readable], first_pairs[readable]
    arrays = {
        "images": images,
        "texts": y.cpu().numpy(),
        "image_pairs": first_pairs.astype(np.int64),
        "text_pairs": texts.astype(np.int64),
    }
    for kind in ("images", "texts"):
        if not np.isfinite(arrays[kind]).all():
            raise UserError(f"{encoder.run / 'best.pt'} gives {kind} embeddings that are not finite; train it again")
    return arrays
