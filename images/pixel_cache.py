"""Images at the model's size, decoded once: an array of pixels, or JPEG shards where that would take too much room.

The paper resizes every image without cropping, so the array holds exactly what the files give. A JPEG of quality 95
takes a fifth to a tenth of the room and changes a pixel by a few of 255 levels. This module imports no torch, so that
the processes that decode start fast.
"""

import hashlib
import io
import json
import shutil
import zlib
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from images.checked_rows import CheckedRows, row_checksums
from images.files import UnreadableImage, load_image
from images.networks import Input
from pipeline.errors import UserError
from pipeline.files import (
    LOCK,
    is_whole,
    lock,
    open_array,
    read_array,
    read_json,
    read_json_lines,
    remove_notes,
    write_array,
    write_json,
    written_whole,
)
from pipeline.pairs import Images
from pipeline.processes import cores, in_order
from pipeline.progress import ProgressBar

Kind = Literal["raw", "jpeg", "none"]
IMAGES_PER_SHARD = 1000
"""Images that one process decodes at a time, that are counted as done together, and that lie in one JPEG shard."""
SAMPLE = 64
"""Images that are encoded to estimate the size of all."""
JPEG_QUALITY = 95
CHECKSUMS = "checksums.npy"


class Shard(NamedTuple):
    """Consecutive images of a dataset."""

    number: int
    first: int
    """Number of the first image."""
    paths: list[Path]


@dataclass
class PixelCache:
    """The images of a dataset at S x S pixels, by number."""

    pixels: CheckedRows | None
    """(I, S, S, 3) uint8, memory-mapped. None where they are in JPEG shards."""
    folder: Path
    offsets: list[np.ndarray]
    """Of each JPEG shard the places where its images begin, (n + 1,) int64."""
    checksums: np.ndarray | None
    """(I,) uint32, CRC-32 of each image's pixels or JPEG; None for a cache of an earlier version."""
    unreadable: dict[int, str]
    """What is wrong with each unreadable image, by number. It is black."""
    size: int

    def __len__(self) -> int:
        return len(self.pixels) if self.pixels is not None else sum(len(each) - 1 for each in self.offsets)

    def batch(self, numbers: list[int]) -> tuple[np.ndarray, dict[int, str]]:
        """(B, S, S, 3) uint8, and what is wrong with images that were lost since, by number. Those are black.

        Raises UserError where pixels are damaged.
        """
        if self.pixels is not None:
            return self.pixels[numbers], {}
        batch = np.zeros((len(numbers), self.size, self.size, 3), dtype=np.uint8)
        lost: dict[int, str] = {}
        for line, number in enumerate(numbers):
            if number not in self.unreadable:
                shard, place = divmod(number, IMAGES_PER_SHARD)
                first, end = self.offsets[shard][place : place + 2].tolist()
                try:
                    with _shard_path(self.folder, shard).open("rb") as file:
                        file.seek(first)
                        content = file.read(end - first)
                    if self.checksums is not None and zlib.crc32(content) != self.checksums[number]:
                        raise ValueError("it has changed since it was written")
                    batch[line] = np.asarray(Image.open(io.BytesIO(content), formats=("JPEG",)))
                except (OSError, SyntaxError, ValueError):
                    lost[number] = f"image {number} of the pixel cache {self.folder} is damaged; remove that folder"
        return batch, lost


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.jpegs"


def kind_of_cache(wanted: str, images: Images, target: Input, max_pixels: int, limit_gb: float) -> tuple[Kind, float]:
    """The kind of cache for the setting `training.pixel_cache`, and its gigabytes. `auto` is the best within the limit.

    The size of JPEGs is estimated from SAMPLE images.
    """
    if wanted == "none":
        return "none", 0.0
    raw = len(images.paths) * target.size**2 * 3 / 1e9
    if wanted == "raw" or (wanted == "auto" and raw <= limit_gb):
        return "raw", raw
    sample = np.random.default_rng(0).permutation(len(images.paths))[:SAMPLE]
    sizes = [len(_encoded(images.root / images.paths[number], target, max_pixels)[0]) for number in sample]
    jpeg = len(images.paths) * float(np.mean([each for each in sizes if each] or [0])) / 1e9
    return ("jpeg", jpeg) if wanted == "jpeg" or jpeg <= limit_gb else ("none", 0.0)


def cache_folder(parent: Path, kind: str, size: int, made_from: dict[str, Any]) -> Path:
    """Where a cache lies. Other images have another folder: a cache that another run reads is never overwritten."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    return parent / f"pixels-{size}-{kind}-{digest}"


NOTES = ("begun.json", "done.jsonl")
"""What a partial cache is made from, and a line for each part that is done."""


def is_finished(folder: Path) -> bool:
    """Whether a cache's folder holds all of it."""
    return (folder / "pixels.json").is_file()


def room_gb(parent: Path, *caches: Path) -> float:
    """Gigabytes that a cache in `parent` may take: most of the free space, and what `caches` take now."""
    existing = next(path for path in (parent, *parent.absolute().parents) if path.is_dir())
    begun = sum(path.stat().st_size for cache in caches for path in cache.glob("*"))
    return (0.95 * shutil.disk_usage(existing).free + begun) / 1e9


def open_pixel_cache(
    folder: Path,
    kind: Kind,
    gigabytes: float,
    images: Images,
    target: Input,
    max_pixels: int,
    made_from: dict[str, Any],
) -> PixelCache:
    """The cache in `folder`, a `cache_folder`. It is made where it is missing, and resumed where it is partial.

    Raises UserError where it cannot be written, is damaged, the disk has too little room, or a process that decodes was
    killed.
    """
    if not is_finished(folder):
        with lock(folder, wait=True):
            if not is_finished(folder):  # another run may have finished it meanwhile
                try:
                    _make(folder, kind, gigabytes, images, target, max_pixels, made_from)
                except OSError as error:
                    raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    remove_notes(*(folder / name for name in NOTES))
    try:
        return _read_cache(folder, kind, len(images.paths), target.size)
    except (UserError, OSError, ValueError, KeyError) as error:
        raise UserError(f"the pixel cache {folder} is damaged ({error}); remove that folder") from None


def _read_cache(folder: Path, kind: Kind, count: int, size: int) -> PixelCache:
    unreadable = {int(number): why for number, why in read_json(folder / "pixels.json")["unreadable"].items()}
    checksums = read_array(folder / CHECKSUMS) if (folder / CHECKSUMS).exists() else None
    if checksums is not None and (checksums.dtype != np.uint32 or checksums.shape != (count,)):
        raise ValueError(f"{CHECKSUMS} holds {checksums.dtype} {checksums.shape}")
    if kind == "raw":
        pixels = read_array(folder / "pixels.npy")
        if pixels.shape != (count, size, size, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"pixels.npy holds {pixels.dtype} {pixels.shape}")
        return PixelCache(CheckedRows(pixels, checksums, folder), folder, [], checksums, unreadable, size)
    shards = [_shard_path(folder, number) for number in range(-(-count // IMAGES_PER_SHARD))]
    # In memory: a mapped file is an open one, and there may be thousands.
    offsets = [np.array(read_array(shard.with_suffix(".npy"))) for shard in shards]
    for shard, each in zip(shards, offsets, strict=True):
        images = min(IMAGES_PER_SHARD, count - int(shard.stem) * IMAGES_PER_SHARD)
        if each.dtype != np.int64 or each.shape != (images + 1,) or (np.diff(each, prepend=0) < 0).any():
            raise ValueError(f"{shard.stem}.npy does not say where {images} images begin")
        if shard.stat().st_size != each[-1]:
            raise ValueError(f"{shard.name} has {shard.stat().st_size:,} bytes, not {each[-1]:,}")
    return PixelCache(None, folder, offsets, checksums, unreadable, size)


def _make(
    folder: Path,
    kind: Kind,
    gigabytes: float,
    images: Images,
    target: Input,
    max_pixels: int,
    made_from: dict[str, Any],
) -> None:
    """Make the cache, or what is missing of it. Raises UserError and OSError."""
    begun, done = (folder / name for name in NOTES)
    _begin(folder, begun, gigabytes, made_from)
    print(f"writing {'about ' * (kind == 'jpeg')}{gigabytes:.2f} GB of pixels to {folder}")
    if others := sorted(path.name for path in folder.parent.glob("pixels-*-*-*") if path != folder):
        print(f"caches of other images or sizes there: {', '.join(others)}; remove those that are no longer used")
    count = len(images.paths)
    unreadable_by_shard: list[list[tuple[int, str]]] = read_json_lines(done)
    resumed = bool(unreadable_by_shard)
    open_array(folder / CHECKSUMS, (count,), np.uint32, keep=resumed)
    if kind == "raw":
        open_array(folder / "pixels.npy", (count, target.size, target.size, 3), np.uint8, keep=resumed)
    rest = range(len(unreadable_by_shard), -(-count // IMAGES_PER_SHARD))
    shards = (
        Shard(number, first, [images.root / path for path in images.paths[first : first + IMAGES_PER_SHARD]])
        for number, first in ((number, number * IMAGES_PER_SHARD) for number in rest)
    )
    make = partial(_make_shard if kind == "jpeg" else _make_array, folder, target, max_pixels)
    processes = cores() if len(rest) > 1 else 0  # starting them would take longer than it saves
    bar = ProgressBar(total=count, desc="pixels", unit="image")
    bar.update(min(rest.start * IMAGES_PER_SHARD, count))
    results: Any = in_order(make, shards, processes)
    with bar, closing(results), done.open("a", encoding="utf-8") as file:
        for unreadable in results:
            unreadable_by_shard.append(unreadable)
            file.write(json.dumps(unreadable) + "\n")
            file.flush()
            bar.update(min(IMAGES_PER_SHARD, count - bar.n))
    for leftover in folder.glob(".*.part*"):  # of processes that were killed
        leftover.unlink()
    reasons = {
        number * IMAGES_PER_SHARD + place: reason
        for number, unreadable in enumerate(unreadable_by_shard)
        for place, reason in unreadable
    }
    write_json(folder / "pixels.json", {"made_from": made_from, "unreadable": reasons})
    print(f"wrote {folder}")


def _begin(folder: Path, begun: Path, gigabytes: float, made_from: dict[str, Any]) -> None:
    """Keep a partial cache of the same images, or make room for a new one. Raises UserError where there is no room."""
    if is_whole(begun, made_from, ()):
        return
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()
    if gigabytes > (room := room_gb(folder)):
        raise UserError(
            f"the pixel cache takes {gigabytes:.1f} GB and {folder} has room for {room:.1f} GB; make room, or set "
            "training.pixel_cache to auto, jpeg or none"
        )
    write_json(begun, made_from)


def _make_array(folder: Path, target: Input, max_pixels: int, shard: Shard) -> list[tuple[int, str]]:
    """Decode a shard into the array. Returns the places in it of unreadable images, and what is wrong with them."""
    pixels, unreadable = np.load(folder / "pixels.npy", mmap_mode="r+", allow_pickle=False), []
    for place, path in enumerate(shard.paths):
        try:
            pixels[shard.first + place] = np.asarray(load_image(path, target.size, max_pixels, target.interpolation))
        except UnreadableImage as error:
            unreadable.append((place, no_longer_readable(path, error)))
    pixels.flush()
    _note_checksums(folder, shard, row_checksums(pixels[shard.first : shard.first + len(shard.paths)]))
    return unreadable


def _note_checksums(folder: Path, shard: Shard, checksums: np.ndarray) -> None:
    """Write the checksums of a shard's images among those of all."""
    of_all = np.load(folder / CHECKSUMS, mmap_mode="r+", allow_pickle=False)
    of_all[shard.first : shard.first + len(checksums)] = checksums
    of_all.flush()


def _make_shard(folder: Path, target: Input, max_pixels: int, shard: Shard) -> list[tuple[int, str]]:
    """Decode a shard into a file of JPEGs, and a file of their places. Returns as `_make_array`."""
    offsets, checksums, unreadable = [0], [], []
    with written_whole(_shard_path(folder, shard.number)) as temporary_path, temporary_path.open("wb") as file:
        for place, path in enumerate(shard.paths):
            content, why = _encoded(path, target, max_pixels)
            if why:
                unreadable.append((place, why))
            file.write(content)
            offsets.append(offsets[-1] + len(content))
            checksums.append(zlib.crc32(content))
    write_array(_shard_path(folder, shard.number).with_suffix(".npy"), np.array(offsets, dtype=np.int64))
    _note_checksums(folder, shard, np.array(checksums, dtype=np.uint32))
    return unreadable


def _encoded(path: Path, target: Input, max_pixels: int) -> tuple[bytes, str]:
    """A JPEG of the image at the model's size. Where it is unreadable: nothing, and what is wrong."""
    try:
        content = io.BytesIO()
        image = load_image(path, target.size, max_pixels, target.interpolation)
        image.save(content, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return content.getvalue(), ""
    except UnreadableImage as error:
        return b"", no_longer_readable(path, error)


def no_longer_readable(path: Path, error: UnreadableImage) -> str:
    """The message about an image that step 0 could read."""
    return f"{path} was readable when it was prepared and now is not: {error}"
