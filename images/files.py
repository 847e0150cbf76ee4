"""Images from files: any format, mode and size that archives hold, as RGB, or the reason why not.

A path may lead into a tar shard (tar_members.py). Step 0 checks every image once, by the function that training calls.
"""

import contextlib
import functools
import io
import json
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from images.tar_members import find_member, open_member
from pipeline.errors import reason
from pipeline.files import read_json_lines
from pipeline.processes import process_pool
from pipeline.progress import ProgressBar

MAX_PIXELS = 400_000_000

# HEIC is read besides. Pillow reads more formats, but for EPS and the like it starts other programs on the file.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "F", *SIXTEEN_BIT)

STRIP = 4_000_000  # pixels turned into RGB at a time: a decoded giant is never copied as a whole
LONGEST = 16_384  # pixels: a side of twice that is first shrunk by a whole number to no less than this
CHECKED_SIZE = 16  # pixels: what can be read at one size can be read at any, and a JPEG is decoded fastest at 1/8
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
PNG_TEXT = 16_000_000  # bytes of a text or profile in a PNG file, unpacked: Pillow refuses one megabyte

GIANT = "giant"
ONE_AT_A_TIME = 64_000_000  # pixels of an image that is not decoded beside others: it takes 4 bytes a pixel
IMAGES_AT_A_TIME = 16_384  # images that are checked before they are counted as done


class UnreadableImage(ValueError):
    """An image file that cannot be used. `kind` is `missing file` or `unreadable image`, the message says why."""

    def __init__(self, reason: str, kind: str = "unreadable image"):
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.kind)


def load_image(
    path: Path | str, size: int | None = None, max_pixels: int = MAX_PIXELS, interpolation: str = "bilinear"
) -> Image.Image:
    """The image as RGB and upright. Transparent parts are white. Of an animation it is the first frame.

    With `size` it is resized to size x size pixels without cropping (the paper, Sec. 3.3), by an interpolation of
    Pillow's such as bicubic. Each pixel is within one level of torchvision's `resize(..., antialias=True)` of the whole
    image. Memory: what Pillow needs to decode the file (1 byte a pixel for palettes and greys, else 4), and at most
    131,072 bytes times `size`.
    Raises UnreadableImage.
    """
    with _opened(path, max_pixels) as image:
        return _decoded(image, size, interpolation=interpolation)


def load_thumbnail(path: Path | str, longest: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as `load_image` has it, in its proportions, no side longer than `longest` pixels. None is enlarged.

    Raises UnreadableImage.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if max(width, height) <= longest:
            return _decoded(image, None)
        square = _decoded(image, longest, draft=True)
        if _orientation(image) in (5, 6, 7, 8):
            width, height = height, width
    scale = longest / max(width, height)
    return square.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR)


def check_image(
    path: Path | str, decode: bool = True, max_pixels: int = MAX_PIXELS, decode_up_to: int | None = None
) -> UnreadableImage | None:
    """What is wrong with the image, None where nothing is.

    With `decode` it is read as training reads it, else only its header. An image of more pixels than `decode_up_to` is
    not decoded: what is wrong with it is of the kind GIANT.
    """
    try:
        with _opened(path, max_pixels) as image:
            if decode and decode_up_to is not None and image.width * image.height > decode_up_to:
                return UnreadableImage("not decoded yet", kind=GIANT)
            if decode:
                _decoded(image, CHECKED_SIZE, draft=True)
    except UnreadableImage as error:
        return error
    return None


def _decoded(
    image: Image.Image, size: int | None, *, draft: bool = False, interpolation: str = "bilinear"
) -> Image.Image:
    """An opened image as RGB, upright, on white, and resized to size x size pixels where `size` is given.

    The pixels are those of Pillow's resize of the whole image, which torchvision's Resize calls, unless a side has more
    than 2 x LONGEST. Strips of rows are resized to `size` columns, and then all rows: a giant is never whole as RGB.
    With `draft` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size. That is faster, and moves pixels by several levels.
    """
    if draft and size is not None:
        image.draft("RGB", (2 * size, 2 * size))
    image.load()
    width, height = image.size
    black, white = _grey_range(image)
    resampling = Image.Resampling[interpolation.upper()]
    columns = width if size is None else size
    across, down = (1, 1) if size is None else (max(1, width // LONGEST), max(1, height // LONGEST))
    whole = Image.new("RGB", (columns, -(-height // down)))
    rows = max(1, STRIP // width // down) * down
    for top in range(0, height, rows):
        strip = _on_white(image.crop((0, top, width, min(top + rows, height))), black, white).reduce((across, down))
        # The last column and row of a reduced image may stand for fewer than a whole block: the box is a part of it.
        box = (0, 0, width / across, strip.height)
        whole.paste(strip.resize((columns, strip.height), resampling, box), (0, top // down))
    if size is not None:
        whole = whole.resize((size, size), resampling, (0, 0, size, height / down))
    return _upright(whole, _orientation(image))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 to 8. Metadata that are broken have none: 1."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata make Pillow raise anything
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    image.info = {}  # without the published metadata, which Pillow might not be able to write again
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


@contextlib.contextmanager
def _opened(path: Path | str, max_pixels: int) -> Iterator[Image.Image]:
    """The image, its header read. Any error inside becomes UnreadableImage."""
    # Pillow refuses images from 179 megapixels on as decompression bombs. Archives do hold such drawings: `max_pixels`
    # takes the place of that limit, and is compared before anything is decoded.
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PNG_TEXT
    try:
        member = find_member(path)
        status = os.stat(member.shard if member else path)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("is no file")
        if (member.size if member else status.st_size) == 0:
            raise UnreadableImage("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of faults that it can handle, once an image
            with _identified(open_member(member) if member else Path(path)) as image:
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
        raise UnreadableImage(reason(error)) from None


def _identified(file: io.BytesIO | Path) -> Image.Image:
    """An image of any of FORMATS, its header read, or a HEIC one where pillow-heif is installed."""
    try:
        return Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        octets = file.getvalue()[:12] if isinstance(file, io.BytesIO) else _first_bytes(file, 12)
        if octets[4:8] != b"ftyp" or octets[8:12] not in HEIC_BRANDS:
            raise
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise UnreadableImage("HEIC is only read where the package pillow-heif is installed") from None
        register_heif_opener(thumbnails=False)
        return Image.open(file, formats=("HEIF",))


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """The numbers of black and white. Images of 16 bits have a fixed range, those of wider numbers their own."""
    if image.mode in SIXTEEN_BIT:
        return 0.0, 65535.0
    if image.mode in ("I", "F"):
        extrema: Any = image.getextrema()
        low, high = extrema
        return float(low), float(high if high > low else low + 1)
    return 0.0, 255.0


def _on_white(image: Image.Image, black: float, white: float) -> Image.Image:
    """An image of any mode in MODES, or a part of one, as RGB on white. `black` and `white` are its `_grey_range`."""
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

    All cores decode at once, except giants, of which one is in memory at a time. Findings are appended to the file
    `checked` (a JSON list a line), where it is given: a call that was stopped resumes there.
    Raises MemoryError where a process that decodes images was killed.
    """
    wrong: dict[str, UnreadableImage] = {}
    check = functools.partial(check_image, decode=decode, max_pixels=max_pixels)
    bar = ProgressBar(total=len(names), desc="checking images", unit="image")
    if len(names) < 256:  # starting processes would take longer than it saves
        with bar:
            for name in names:
                if error := check(root / name):
                    wrong[name] = error
                bar.update()
        return wrong
    done = 0
    for count, records in read_json_lines(checked) if checked else []:
        wrong |= {name: UnreadableImage(reason, kind) for name, kind, reason in records}
        done += count
    bar.update(done - sum(error.kind == GIANT for error in wrong.values()))
    try:
        with bar, process_pool() as pool:
            small = functools.partial(check, decode_up_to=ONE_AT_A_TIME)
            for start in range(done, len(names), IMAGES_AT_A_TIME):  # a pool takes in all it is given to map at once
                some = names[start : start + IMAGES_AT_A_TIME]
                found: dict[str, UnreadableImage] = {}
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
