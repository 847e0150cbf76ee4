"""Reader of Conceptual Captions (Sharma et al., ACL 2018): web images with their cleaned alt texts.

It is a case of webdataset.py: the shards are read as there, and the captions are those of its owner's lists.

Google publishes captions and addresses; the images are what `img2dataset` could still download, as files or in tar
shards. Its key is the address: which caption belongs to a downloaded image is looked up by it.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from images.tar_members import without_place
from pipeline.errors import UserError, reason
from pipeline.processes import in_order
from pipeline.progress import ProgressBar
from pipeline.schema import Dataset
from readers.published import (
    TOO_LONG,
    Published,
    Row,
    checked,
    files_below,
    given_root,
    is_system_file,
    lines_of,
    look_for,
)
from readers.webdataset import SHARDS_WORTH_A_PROCESS, files_in, shards_of

CONCEPTUAL_CAPTIONS = "https://ai.google.com/research/ConceptualCaptions/download"
IMG2DATASET = "https://github.com/rom1504/img2dataset (dataset_examples/cc3m.md)"
PARTS = {
    "train": ("Train_GCC-training.tsv", ("train", "training")),
    "test": ("Validation_GCC-1.1.0-Validation.tsv", ("val", "validation")),
}
"""By our split: the owner's file, and names of the folder into which its images were downloaded.

The owner keeps the captions of the test images, so the published validation part is what is tested on.
"""
IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def conceptual_captions(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """Conceptual Captions: the two TSVs, and a folder for each that img2dataset wrote.

    dataset.root holds `Train_GCC-training.tsv` and `Validation_GCC-1.1.0-Validation.tsv` (caption, tab, address) and
    the folders train/ and val/. In these lie shards, NNNNN.tar or a folder NNNNN/ of files each, and their metadata,
    NNNNN.parquet (without it, the .json of each image is read). Raises UserError where one of these is missing.
    """
    root = given_root(dataset, f"{CONCEPTUAL_CAPTIONS}; images with {IMG2DATASET}")
    parts = {}
    for split, (name, folders) in PARTS.items():
        captions = look_for(root, (name,), f"captions to {split} on", CONCEPTUAL_CAPTIONS)
        folder = look_for(root, folders, f"folder with the images of {name}", IMG2DATASET)
        if not shards_of(folder):
            names = sorted(path.name for path in folder.iterdir() if not is_system_file(path.name))
            found = ", ".join(names[:5]) or "nothing"
            raise UserError(
                f"{folder} holds no shards: looked for NNNNN.tar or NNNNN/, found {found}; see {IMG2DATASET}"
            )
        parts[split] = (captions, folder)
    images = [folder.name for _, folder in parts.values()]
    return Published(
        root,
        lambda: read_conceptual_captions(root, parts),
        tuple(captions for captions, _ in parts.values()),
        lambda: files_below(root, *images),
    )


def read_conceptual_captions(root: Path, parts: dict[str, tuple[Path, Path]]) -> Iterator[Row]:
    """Rows of the TSVs, in their order. `parts` maps each split to its TSV and its folder of images.

    A row whose image was not downloaded is rejected. Rows with the same address are texts of the same image.
    """
    for split, (captions, folder) in parts.items():
        downloads = Downloads(root, folder)
        try:
            with captions.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
                lines = ((number, TOO_LONG if line is None else line) for number, line in lines_of(file))
                while some := list(itertools.islice(lines, 10_000)):
                    records = [line.rstrip("\r\n").split("\t") for _, line in some]
                    found = downloads.find([record[-1] for record in records])
                    for (number, line), record, (image, why) in zip(some, records, found, strict=True):
                        label = f"{captions.name} line {number}"
                        if len(record) != 2:
                            if line.strip():
                                why = f"has {len(record)} fields, not caption and address"
                                yield Row(label, split=split, rejected=("bad row", why))
                        elif record == ["caption", "url"] and number == 1:
                            continue  # the first line that img2dataset's instructions have one add
                        elif image is None:
                            yield Row(
                                label, text=record[0], split=split, rejected=("missing file", f"{record[1]} {why}")
                            )
                        else:
                            yield checked(root, Row(label, image, record[0], without_place(image), split=split))
        except OSError as error:
            raise UserError(f"cannot read {captions}: {error.strerror}") from None


# What img2dataset wrote


class Downloads:
    """Where the images of a folder of shards are, by address. Takes about 60 bytes an image."""

    def __init__(self, root: Path, folder: Path) -> None:
        shards = shards_of(folder)
        processes = None if len(shards) > SHARDS_WORTH_A_PROCESS else 0
        parts = in_order(functools.partial(_of_shard, root), shards, processes)
        found = [*ProgressBar(parts, f"shards of {folder.name}", len(shards), unit="shard")]
        keys = np.concatenate([part[0] for part in found])
        self._there = np.concatenate([part[1] for part in found])
        # Of equal addresses the first that was downloaded counts: failed ones may have been fetched again.
        self._order = np.lexsort((~self._there, keys))
        self._keys = keys[self._order]
        self._texts = pa.concat_arrays([part[2] for part in found])

    def find(self, addresses: list[str]) -> list[tuple[str | None, str]]:
        """For each address the path of its image, or None and why there is none."""
        wanted = _keys(addresses)
        places = np.searchsorted(self._keys, wanted)
        known = places < len(self._keys)
        known[known] = self._keys[places[known]] == wanted[known]
        numbers = self._order[places[known]]
        texts = iter(self._texts.take(pa.array(numbers)).to_pylist())
        there = iter(self._there[numbers].tolist())
        return [
            ((next(texts), "") if next(there) else (None, next(texts))) if is_known else (None, "is in no shard")
            for is_known in known.tolist()
        ]


def _keys(addresses: list[str]) -> np.ndarray:
    """A number (uint64) for each address, equal where they are."""
    digests = (hashlib.blake2b(each.encode(errors="surrogatepass"), digest_size=8).digest() for each in addresses)
    return np.frombuffer(b"".join(digests), np.uint64)


def _of_shard(root: Path, shard: Path) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """What a shard holds: keys of addresses (uint64), whether each was downloaded (bool), its path or the reason."""
    paths, addresses = _images_of(root, shard)
    metadata = shard.with_suffix(".parquet") if shard.suffix else shard.with_name(f"{shard.name}.parquet")
    outcomes: dict[str, str] = {}
    if metadata.is_file():
        try:
            table = pq.read_table(metadata, columns=["key", "url", "status", "error_message"])
            table.validate(full=True)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise UserError(f"cannot read {metadata}: {reason(error)}; it should be as img2dataset wrote it") from None
        for record in table.to_pylist():
            if not isinstance(record["key"], str) or not isinstance(record["url"], str | None):
                raise UserError(f"{metadata} has a key or url that is no text; it should be as img2dataset wrote it")
            addresses[record["key"]] = record["url"] or ""
            if record["status"] != "success":
                outcomes[record["key"]] = f"was not downloaded ({record['error_message'] or record['status']})"
    texts = [paths.get(key) or outcomes.get(key, "is not in its shard") for key in addresses]
    there = np.array([key in paths for key in addresses], bool)
    # A file's name need not be UTF-8; one that is not leads to no file.
    texts = [text.encode(errors="replace").decode() for text in texts]
    return _keys(list(addresses.values())), there, pa.array(texts, pa.large_string())


def _images_of(root: Path, shard: Path) -> tuple[dict[str, str], dict[str, str]]:
    """By key, the paths of the images in a shard, and, where there is no Parquet file, the addresses in its .json."""
    paths: dict[str, str] = {}
    addresses: dict[str, str] = {}
    needs_json = not shard.with_name(f"{shard.stem}.parquet").is_file()
    for file in files_in(root, shard):
        key = PurePosixPath(file.key).name
        if file.suffix in IMAGES:
            paths[key] = file.path
        elif file.suffix == ".json" and needs_json:
            try:
                addresses[key] = str(json.loads(file.read())["url"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue  # an image whose address nobody knows belongs to no caption
    return paths, addresses
