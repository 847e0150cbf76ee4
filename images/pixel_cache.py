"""Images at the model's size, decoded once: an array of pixels, or JPEG shards where that would take too much room.

The paper resizes every image without cropping, so what the array holds is what the files would give, to the last bit. A
JPEG of quality 95 takes a fifth to a tenth of the room and moves a pixel by a few of 255 levels. This module imports no
torch, so that the processes that decode start fast.
"""

import hashlib
import io
import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from images.files import UnreadableImage, load_image
from pipeline.errors import UserError
from pipeline.files import LOCK, lock, open_array, read_array, read_json, write_array, write_json, written_whole
from pipeline.pairs import Images
from pipeline.processes import cores, in_order

Kind = Literal["raw", "jpeg", "none"]
Part = tuple[int, int, list[Path]]
"""A part's number, the number of its first image, and its images' files."""

IMAGES_A_PART = 1000
"""Images that are decoded before they are counted as done, and that lie in one shard."""
SAMPLE = 64
"""Images that are encoded to estimate the size of all."""
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}


@dataclass
class PixelCache:
    """The images of a dataset at S x S pixels, by number."""

    pixels: np.ndarray | None
    """(I, S, S, 3) uint8, memory-mapped; None where they are in shards."""
    folder: Path
    offsets: list[np.ndarray]
    """Of each shard where its images begin in it, (n + 1,) int64."""
    unreadable: dict[int, str]
    """What is wrong with each image, by number, that could not be read: black."""
    size: int

    def __len__(self) -> int:
        return len(self.pixels) if self.pixels is not None else sum(len(each) - 1 for each in self.offsets)

    def batch(self, numbers: list[int]) -> tuple[np.ndarray, dict[int, str]]:
        """(B, S, S, 3) uint8, and by number what is wrong with those that are lost since: black, as the unreadable."""
        if self.pixels is not None:
            return self.pixels[numbers], {}
        batch, lost = np.zeros((len(numbers), self.size, self.size, 3), dtype=np.uint8), {}
        for line, number in enumerate(numbers):
            if number not in self.unreadable:
                shard, place = divmod(number, IMAGES_A_PART)
                first, end = self.offsets[shard][place : place + 2].tolist()
                try:
                    with _shard(self.folder, shard).open("rb") as file:
                        file.seek(first)
                        batch[line] = Image.open(io.BytesIO(file.read(end - first)), formats=("JPEG",))
                except (OSError, SyntaxError, ValueError):
                    lost[number] = f"image {number} of the pixel cache {self.folder} is lost: remove that folder"
        return batch, lost


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.jpegs"


def kind_of_cache(wanted: str, images: Images, size: int, max_pixels: int, limit_gb: float) -> tuple[Kind, float]:
    """What `training.pixel_cache` comes to, and the gigabytes it takes: `auto` is the best that keeps to the limit.

    An array's size is known; that of JPEGs is estimated from SAMPLE images.
    """
    if wanted == "none":
        return "none", 0.0
    raw = len(images.paths) * size * size * 3 / 1e9
    if wanted == "raw" or (wanted == "auto" and raw <= limit_gb):
        return "raw", raw
    sample = np.random.default_rng(0).permutation(len(images.paths))[:SAMPLE]
    sizes = [len(_encoded(images.root / images.paths[number], size, max_pixels)[0]) for number in sample]
    jpeg = len(images.paths) * float(np.mean([each for each in sizes if each] or [0])) / 1e9
    return ("jpeg", jpeg) if wanted == "jpeg" or jpeg <= limit_gb else ("none", 0.0)


def cache_folder(parent: Path, kind: str, size: int, made_from: dict[str, Any]) -> Path:
    """Where a cache lies: other images have another folder, so that none is overwritten that another run reads."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    return parent / f"pixels-{size}-{kind}-{digest}"


def is_finished(folder: Path) -> bool:
    """Whether a cache's folder holds all of it."""
    return (folder / "pixels.json").is_file()


def room_gb(parent: Path, *caches: Path) -> float:
    """Gigabytes that a cache may take beside `parent`'s other files: most of what is free, and what it has already."""
    there = next(path for path in (parent, *parent.absolute().parents) if path.is_dir())
    begun = sum(path.stat().st_size for cache in caches for path in cache.glob("*"))
    return (0.95 * shutil.disk_usage(there).free + begun) / 1e9


def open_pixel_cache(
    folder: Path, kind: Kind, gigabytes: float, images: Images, size: int, max_pixels: int, made_from: dict[str, Any]
) -> PixelCache:
    """The cache in `folder`, a `cache_folder`, made where it is not there; one that was stopped goes on.

    Raises UserError where it cannot be written, is damaged, the disk has too little room, or a process that decodes was
    killed.
    """
    if not is_finished(folder):
        with lock(folder):
            if not is_finished(folder):  # another run may have finished it meanwhile
                try:
                    _make(folder, kind, gigabytes, images, size, max_pixels, made_from)
                except OSError as error:
                    raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    try:
        return _whole_cache(folder, kind, len(images.paths), size)
    except (UserError, OSError, ValueError, KeyError) as error:
        raise UserError(f"the pixel cache {folder} is damaged ({error}); remove that folder") from None


def _whole_cache(folder: Path, kind: Kind, count: int, size: int) -> PixelCache:
    unreadable = {int(number): why for number, why in read_json(folder / "pixels.json")["unreadable"].items()}
    if kind == "raw":
        pixels = read_array(folder / "pixels.npy")
        if pixels.shape != (count, size, size, 3):
            raise ValueError(f"pixels.npy has the shape {pixels.shape}")
        return PixelCache(pixels, folder, [], unreadable, size)
    shards = [_shard(folder, number) for number in range(-(-count // IMAGES_A_PART))]
    # In memory: each mapped file would be an open one.
    offsets = [np.array(read_array(shard.with_suffix(".npy"))) for shard in shards]
    for shard, each in zip(shards, offsets, strict=True):
        if shard.stat().st_size != each[-1]:
            raise ValueError(f"{shard.name} has {shard.stat().st_size:,} bytes, not {each[-1]:,}")
    return PixelCache(None, folder, offsets, unreadable, size)


def _make(
    folder: Path, kind: Kind, gigabytes: float, images: Images, size: int, max_pixels: int, made_from: dict[str, Any]
) -> None:
    begun, done = folder / "begun.json", folder / "done.jsonl"
    if not (begun.is_file() and read_json(begun) == made_from):
        for path in folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        if gigabytes > (room := room_gb(folder)):
            raise UserError(
                f"the pixel cache takes {gigabytes:.1f} GB and {folder} has room for {room:.1f} GB; make room, or set "
                "training.pixel_cache to auto, jpeg or none"
            )
        write_json(begun, made_from)
    print(f"writing {'about ' * (kind == 'jpeg')}{gigabytes:.2f} GB of pixels to {folder}")
    if others := sorted(path.name for path in folder.parent.glob("pixels-*-*-*") if path != folder):
        print(f"beside it, from other images or of another size: {', '.join(others)}; remove what is not used any more")
    count, unreadable, parts = len(images.paths), {}, []
    if done.is_file():  # what was being written when it was stopped has no end
        lines = [line for line in done.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        done.write_text("".join(lines), encoding="utf-8")
        parts = [json.loads(line) for line in lines]
    if kind == "raw":
        open_array(folder / "pixels.npy", (count, size, size, 3), np.uint8, keep=bool(parts))
    todo = [(part, part * IMAGES_A_PART) for part in range(len(parts), -(-count // IMAGES_A_PART))]
    make = partial(_make_shard if kind == "jpeg" else _make_array, folder, size, max_pixels)
    of_parts = (
        (part, first, [images.root / path for path in images.paths[first : first + IMAGES_A_PART]])
        for part, first in todo
    )
    processes = cores() if len(todo) > 1 else 0  # starting them would take longer than it saves
    bar = tqdm(total=count, desc="pixels", unit="image", disable=None)
    bar.update(min(len(parts) * IMAGES_A_PART, count))
    with bar, closing(in_order(make, of_parts, processes)) as results, done.open("a", encoding="utf-8") as file:
        for found in results:
            parts.append(found)
            file.write(json.dumps(found) + "\n")
            file.flush()
            bar.update(min(IMAGES_A_PART, count - bar.n))
    for number, found in enumerate(parts):
        unreadable |= {number * IMAGES_A_PART + place: why for place, why in found}
    for leftover in folder.glob(".*.part*"):  # of processes that were killed
        leftover.unlink()
    write_json(folder / "pixels.json", {"made_from": made_from, "unreadable": unreadable})
    begun.unlink()
    done.unlink()
    print(f"wrote {folder}")


def _make_array(folder: Path, size: int, max_pixels: int, of: Part) -> list[tuple[int, str]]:
    """Decode a part into the array; returns places in it of images that cannot be read, and what is wrong."""
    _, first, paths = of
    pixels, unreadable = np.load(folder / "pixels.npy", mmap_mode="r+", allow_pickle=False), []
    for place, path in enumerate(paths):
        try:
            pixels[first + place] = np.asarray(load_image(path, size, max_pixels))
        except UnreadableImage as error:
            unreadable.append((place, no_longer_readable(path, error)))
    pixels.flush()
    return unreadable


def _make_shard(folder: Path, size: int, max_pixels: int, of: Part) -> list[tuple[int, str]]:
    """Decode a part into a shard of JPEGs, and where they begin; returns as `_make_array`."""
    (part, _, paths), offsets, unreadable = of, [0], []
    with written_whole(_shard(folder, part)) as beside, beside.open("wb") as shard:
        for place, path in enumerate(paths):
            content, why = _encoded(path, size, max_pixels)
            if why:
                unreadable.append((place, why))
            shard.write(content)
            offsets.append(offsets[-1] + len(content))
    write_array(_shard(folder, part).with_suffix(".npy"), np.array(offsets, dtype=np.int64))
    return unreadable


def _encoded(path: Path, size: int, max_pixels: int) -> tuple[bytes, str]:
    """A JPEG of the image at the model's size; nothing, and what is wrong, where it cannot be read."""
    try:
        content = io.BytesIO()
        load_image(path, size, max_pixels).save(content, **JPEG)
        return content.getvalue(), ""
    except UnreadableImage as error:
        return b"", no_longer_readable(path, error)


def no_longer_readable(path: Path, error: UnreadableImage) -> str:
    """What is said of an image that step 0 could read."""
    return f"{path} was readable when it was prepared and now is not: {error}"
