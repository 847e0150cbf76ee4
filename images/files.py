"""Images from files: any format, mode and size that archives hold, as RGB, or one reason why not.

A path may lead into a tar shard (shards.py). Used by step 0, which checks every image once, and by the workers that
decode images while the model trains.
"""

import contextlib
import functools
import json
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from images.tar_members import find_member, open_member
from pipeline.processes import process_pool

# Pillow refuses images from 179 megapixels on, as they may be decompression bombs. Archives do hold such drawings, so
# `max_pixels` takes the place of that limit: it is looked at before anything is decoded, and the user can set it.
Image.MAX_IMAGE_PIXELS = None
MAX_PIXELS = 400_000_000

# Not all that Pillow reads: its readers of EPS and the like start other programs on what is in the file.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "F", *SIXTEEN_BIT)

STRIP = 4_000_000  # pixels turned into RGB at a time: a decoded giant is never copied as a whole
SPARE = 3  # before it is resized, an image is shrunk by whole numbers to no less than this many times the wanted size
GIANT = "giant"
ONE_AT_A_TIME = 64_000_000  # images from this many pixels on are not decoded side by side: each takes 4 bytes a pixel

IMAGES_AT_A_TIME = 16_384  # images that are checked before they are counted as done

# Where the EXIF orientation says that the camera was turned (the table in the EXIF standard, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """An image file that cannot be used. `kind` is `missing file` or `unreadable image`, the message says why."""

    def __init__(self, reason: str, kind: str = "unreadable image"):
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.kind)


def load_image(path: Path | str, size: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as RGB, upright, what is transparent white, of an animation the first frame.

    With `size` it is resized to size x size pixels without cropping (the paper, Sec. 3.3), antialiased. Memory: what
    Pillow needs to decode the file (1 byte a pixel for palettes and greys, else 4), not more.
    Raises UnreadableImage.
    """
    with _opened(path, max_pixels) as image:
        if size is not None:
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
        image.load()
        width, height = image.size
        gap = None if size is None else SPARE * size
        across, down = (1, 1) if gap is None else (max(1, width // gap), max(1, height // gap))
        black, white = _grey_range(image)
        if size is not None and across == down == 1:
            small = _on_white(image, black, white)
        else:
            small = Image.new("RGB", (-(-width // across), -(-height // down)))
            rows = max(1, STRIP // width // down) * down
            for top in range(0, height, rows):
                strip = image.crop((0, top, width, min(top + rows, height)))
                small.paste(_on_white(strip, black, white).reduce((across, down)), (0, top // down))
        if size is not None:
            # the last column and row may stand for less than a whole block, so the box is not the whole of `small`
            box = (0, 0, width / across, height / down)
            small = small.resize((size, size), Image.Resampling.BILINEAR, box)
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return small.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else small


def load_thumbnail(path: Path | str, longest: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as `load_image` has it, its proportions kept, no side longer than `longest` pixels; none is enlarged.

    Raises UnreadableImage.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    if max(width, height) <= longest:
        return load_image(path, max_pixels=max_pixels)
    scale = longest / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    square = load_image(path, size=longest, max_pixels=max_pixels)
    return square.resize(size[::-1] if on_its_side else size, Image.Resampling.BILINEAR)


def check_image(
    path: Path | str, decode: bool = True, max_pixels: int = MAX_PIXELS, decode_up_to: int | None = None
) -> UnreadableImage | None:
    """What is wrong with the image, None where nothing is: its header is read, and with `decode` all of it.

    An image of more pixels than `decode_up_to` is not decoded but said to be of the kind GIANT.
    """
    try:
        with _opened(path, max_pixels) as image:
            if decode and decode_up_to is not None and image.width * image.height > decode_up_to:
                return UnreadableImage("not decoded yet", kind=GIANT)
            if decode:
                image.load()
    except UnreadableImage as error:
        return error
    return None


@contextlib.contextmanager
def _opened(path: Path | str, max_pixels: int) -> Iterator[Image.Image]:
    """The image, its header read; whatever goes wrong inside becomes UnreadableImage."""
    try:
        member = find_member(path)
        status = os.stat(member.shard if member else path)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("is no file")
        if (member.size if member else status.st_size) == 0:
            raise UnreadableImage("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on oddities that it copes with, one an image
            with Image.open(open_member(member) if member else path, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise UnreadableImage(
                        f"{image.width} x {image.height} pixels are more than dataset.max_pixels {max_pixels}"
                    )
                if image.mode not in MODES:
                    raise UnreadableImage(f"its colour mode is {image.mode}")
                yield image
    except (UnreadableImage, MemoryError):
        raise
    except FileNotFoundError:
        raise UnreadableImage(str(path), kind="missing file") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image in a known format") from None
    except Exception as error:  # damaged files make Pillow's readers raise anything
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from None


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """Which numbers are black and white: 16 bits have a range of their own, for wider numbers it is the image's."""
    if image.mode in SIXTEEN_BIT:
        return 0.0, 65535.0
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        return float(low), float(high if high > low else low + 1)
    return 0.0, 255.0


def _on_white(image: Image.Image, black: float, white: float) -> Image.Image:
    """A (part of an) image of any mode in MODES as RGB on a white ground; `black` and `white` as `_grey_range` says."""
    if image.mode in ("I", "F", *SIXTEEN_BIT):  # Pillow would cut these off at 255
        grey = (np.asarray(image, dtype=np.float32) - black) * (255 / (white - black))
        return Image.fromarray(np.rint(np.nan_to_num(grey).clip(0, 255)).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGB", image.size, "white")
    image = image.convert("RGBA")
    ground.paste(image, mask=image)
    return ground


# Checking many images


def check_images(
    root: Path,
    names: Sequence[str],
    decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    checked: Path | None = None,
) -> dict[str, UnreadableImage]:
    """Those of the images `names` (paths relative to `root`) that cannot be used, and what is wrong with them.

    All cores decode side by side, but giants one after another, so that memory is bounded by one of them. What is
    found is kept in the file `checked` (a JSON list a line), where it is given: a call that was stopped goes on from
    there. Raises MemoryError where a process that decodes images was killed.
    """
    wrong: dict[str, UnreadableImage] = {}
    check = functools.partial(check_image, decode=decode, max_pixels=max_pixels)
    bar = tqdm(total=len(names), desc="checking images", unit="image", disable=None)
    if len(names) < 256:  # starting processes would take longer than it saves
        with bar:
            for name in names:
                if error := check(root / name):
                    wrong[name] = error
                bar.update()
        return wrong
    done, parts = 0, _parts_checked(checked) if checked else []
    for count, found in parts:
        wrong |= {name: UnreadableImage(reason, kind) for name, kind, reason in found}
        done += count
    bar.update(done - sum(error.kind == GIANT for error in wrong.values()))
    try:
        with bar, process_pool() as pool:
            small = functools.partial(check, decode_up_to=ONE_AT_A_TIME)
            for start in range(done, len(names), IMAGES_AT_A_TIME):  # a pool takes in all it is given to map at once
                some = names[start : start + IMAGES_AT_A_TIME]
                found = {}
                for name, error in zip(
                    some, pool.map(small, (root / name for name in some), chunksize=32), strict=True
                ):
                    if error is not None:
                        found[name] = error
                    bar.update(error is None or error.kind != GIANT)
                wrong |= found
                if checked:
                    line = [len(some), [[name, error.kind, str(error)] for name, error in found.items()]]
                    with checked.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            for name in [name for name, error in wrong.items() if error.kind == GIANT]:
                if error := pool.submit(check, root / name).result():
                    wrong[name] = error
                else:
                    del wrong[name]
                bar.update()
    except BrokenProcessPool:
        raise MemoryError("a process that decodes images was killed") from None
    return wrong


def _parts_checked(path: Path) -> list[tuple[int, list[tuple[str, str, str]]]]:
    """The parts of the images that a call before this one has checked; what it was writing when it was stopped goes."""
    parts = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        path.write_text("".join(whole), encoding="utf-8")
        parts = [json.loads(line) for line in whole]
    return parts
