"""Images of every mode and size, and what cannot be read."""

import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps
from torchvision.transforms.functional import resize

from images import files as images
from images.files import UnreadableImage, check_image, check_images, load_image, load_thumbnail
from images.tar_members import members

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def palette(*, transparent: bytes | int | None) -> tuple[Image.Image, dict[str, object]]:
    """Left half colour 0, red; right half colour 1, blue, transparent as said."""
    image = Image.new("P", (40, 20), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (20, 0, 40, 20))
    return image, {} if transparent is None else {"transparency": transparent}


# Colours


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "wanted"),
    [
        ("RGB", RED, "png", RED),
        ("L", 100, "png", (100, 100, 100)),
        ("1", 1, "png", WHITE),
        ("RGBA", (255, 0, 0, 128), "png", (255, 127, 127)),
        ("RGBA", (0, 0, 0, 0), "png", WHITE),
        ("RGBA", (255, 0, 0, 128), "webp", (255, 127, 127)),
        ("LA", (0, 51), "png", (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), "tiff", RED),
        ("RGB", RED, "bmp", RED),
        ("RGB", RED, "ppm", RED),
    ],
)
def test_flat_images_of_every_mode(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], suffix: str, wanted: tuple[int, ...]
) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(Image.new(mode, (30, 20), colour), tmp_path / f"image.{suffix}", **options)
    for size in (None, 8):
        image = load_image(path, size)
        assert image.mode == "RGB"
        assert image.size == ((30, 20) if size is None else (8, 8))
        assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("transparent", [bytes([255, 0]), 1])
def test_palette_with_transparency(tmp_path: Path, transparent: bytes | int) -> None:
    image, options = palette(transparent=transparent)
    loaded = load_image(saved(image, tmp_path / "image.png", **options))
    assert loaded.getpixel((5, 5)) == RED
    assert loaded.getpixel((35, 5)) == WHITE


def test_palette_colours_are_mixed_as_colours_and_not_as_numbers(tmp_path: Path) -> None:
    image = Image.new("P", (1000, 1000), 0)
    image.putpalette([255, 0, 0, *([0, 255, 0] * 254), 0, 0, 255])
    image.paste(255, (500, 0, 1000, 1000))
    loaded = np.asarray(load_image(saved(image, tmp_path / "image.png"), 25))
    assert loaded[..., 1].max() == 0, "green lies between red and blue in the palette, and nowhere in the picture"


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = saved(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), tmp_path / "image.jpg", quality=95)
    assert np.abs(np.asarray(load_image(path, 16)).astype(int) - RED).max() <= 6


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    path = saved(Image.fromarray(np.tile(ramp, (4, 1))), tmp_path / "image.png")
    assert np.array_equal(np.asarray(load_image(path))[0, :, 0], np.arange(256))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_greys_take_the_range_of_the_image(tmp_path: Path, dtype: type) -> None:
    ramp = (np.arange(256) * 1000 - 7).astype(dtype)
    path = saved(Image.fromarray(np.tile(ramp, (4, 1))), tmp_path / "image.tiff")
    assert np.array_equal(np.asarray(load_image(path))[0, :, 0], np.arange(256))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    path = saved(frames[0], tmp_path / "image.gif", save_all=True, append_images=frames[1:], duration=10)
    assert load_image(path).getpixel((5, 5)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path / f"image.{suffix}", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(wanted))
    resized = np.asarray(wanted.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(np.asarray(load_image(path, 16)).astype(int) - resized).max() <= 1


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (8, 8), "red"), tmp_path / "image.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_image(path).size == (8, 8)


# Sizes


def test_nothing_is_cropped(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 20), "green")
    image.putpixel((0, 0), RED)
    image.paste("red", (0, 0, 60, 20))
    image.paste("blue", (240, 0, 300, 20))
    loaded = load_image(saved(image, tmp_path / "image.png"), 10)
    assert loaded.getpixel((0, 5)) == RED
    assert loaded.getpixel((9, 5)) == (0, 0, 255)


@pytest.mark.parametrize("shape", [(700, 501), (97, 1600), (33, 20), (1, 900), (1600, 1200)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "JPEG"])
def test_every_pixel_is_within_one_level_of_torchvisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], mode: str
) -> None:
    """Noise, in strips, against torchvision's resize of the whole image. It rounds once where Pillow rounds twice."""
    channels = 4 if mode == "RGBA" else 3
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], channels), np.uint8))
    image = image.quantize(32) if mode == "P" else image
    path = saved(image, tmp_path / f"image.{'jpg' if mode == 'JPEG' else 'png'}")
    monkeypatch.setattr(images, "STRIP", 20_000)
    whole = torch.from_numpy(np.asarray(load_image(path)).copy()).permute(2, 0, 1)
    wanted = resize(whole, [24, 24], antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(load_image(path, 24)).astype(int) - wanted).max() <= 1
    if mode != "JPEG":
        ground = Image.new("RGB", shape, "white")
        ground.paste(image, mask=image if mode == "RGBA" else None)
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(ground))


def seen_and_peak(path: Path) -> tuple[str, int]:
    """What `load_image` of 224 pixels gives in a process of its own, and the peak of its memory in megabytes."""
    program = (
        "import re, sys\nfrom images import files as images\n"
        "image = images.load_image(sys.argv[1], 224)\n"
        "print(image.size, image.getpixel((3, 3)), image.getpixel((220, 220)))\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seen, megabytes = done.stdout.splitlines()
    return seen, int(megabytes)


@pytest.mark.parametrize("shape", [(1601, 3), (3, 1601)])
def test_a_long_side_is_shrunk_first_and_nothing_shifts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """1,601 rows or columns become 801 blocks of two, and the last block is half a one."""
    monkeypatch.setattr(images, "LONGEST", 800)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    wanted = np.asarray(image.resize((4, 4), Image.Resampling.BILINEAR)).astype(int)
    loaded = np.asarray(load_image(saved(image, tmp_path / "image.png"), 4))[..., 0]
    assert np.abs(loaded - wanted).max() <= 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("shape", [(1, 20_000_000), (20_000_000, 1)])
def test_an_image_of_one_column_or_row_needs_little_memory(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Widened before it is shortened, a column of 20 million pixels would take 18 GB."""
    path = saved(Image.new("L", shape, 7), tmp_path / "long.png")
    seen, megabytes = seen_and_peak(path)
    assert seen == "(224, 224) (7, 7, 7) (7, 7, 7)"
    assert megabytes < 500


def test_the_check_of_a_jpeg_decodes_it_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("RGB", (1600, 1200), RED), tmp_path / "image.jpg")
    sizes = []
    monkeypatch.setattr(images, "_on_white", lambda image, black, white: sizes.append(image.width) or image)
    assert check_image(path) is None
    assert sizes == [200]
    load_image(path, 16)
    assert sizes[1:] == [1600]


def write_huge_palette_png(path: Path, width: int = 20_000, height: int = 11_550) -> None:
    """231 megapixels in a few kilobytes: left half red, right half blue, one filter byte a row."""
    compress = zlib.compressobj(1)
    row = bytes(1 + width // 2) + b"\1" * (width - width // 2)
    data = b"".join(compress.compress(row) for _ in range(height)) + compress.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255])), chunk(b"IDAT", data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_huge_drawing_needs_little_memory(tmp_path: Path) -> None:
    write_huge_palette_png(tmp_path / "huge.png")
    seen, megabytes = seen_and_peak(tmp_path / "huge.png")
    assert seen == "(224, 224) (255, 0, 0) (0, 0, 255)"
    assert megabytes < 500, "231 MB decoded, where RGB would take 924"


# What cannot be read


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no images, each with a part of the reason."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("png", "jpg", "gif"):
        whole = saved(noise, folder / f"whole.{suffix}").read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404 Not Found</html>")
    (folder / "folder.png").mkdir()
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    noise.save(folder / "wide.png")
    return {
        "truncated.png": "truncated",
        "truncated.jpg": "truncated",
        "truncated.gif": "truncated",
        "empty.png": "the file is empty",
        "page.jpg": "not an image",
        "folder.png": "is no file",
        "program.png": "not an image",
        "missing.png": "missing.png",
    }


def test_reasons(tmp_path: Path) -> None:
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(UnreadableImage, match=reason) as caught:
            load_image(tmp_path / name)
        assert caught.value.kind == ("missing file" if name == "missing.png" else "unreadable image"), name
        assert str(check_image(tmp_path / name)) == str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.kind) == (str(caught.value), caught.value.kind)


def test_only_the_header_is_read_unless_asked(tmp_path: Path) -> None:
    broken_files(tmp_path)
    assert check_image(tmp_path / "truncated.png", decode=False) is None
    assert check_image(tmp_path / "truncated.png", decode=True) is not None
    assert check_image(tmp_path / "page.jpg", decode=False) is not None


def test_too_many_pixels(tmp_path: Path) -> None:
    path = saved(Image.new("1", (100, 100)), tmp_path / "image.png")
    assert check_image(path, max_pixels=10_000) is None
    assert "100 x 100 pixels" in str(check_image(path, decode=False, max_pixels=9_999))
    with pytest.raises(UnreadableImage, match=r"dataset\.max_pixels 9999"):
        load_image(path, 8, max_pixels=9_999)


def test_pillows_own_limit_does_not_interfere(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    write_huge_palette_png(path, 20_000, 20_000)
    assert check_image(path, decode=False) is None


def test_many_images_are_checked_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = broken_files(tmp_path)
    names = [f"image{number}.png" for number in range(300)]
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / name)
    Image.new("L", (40, 40)).save(tmp_path / "giant.png")
    (tmp_path / "broken giant.png").write_bytes((tmp_path / "truncated.png").read_bytes())
    names += [*reasons, "giant.png", "broken giant.png"]
    random.Random(0).shuffle(names)
    monkeypatch.setattr(images, "ONE_AT_A_TIME", 500)
    found = check_images(tmp_path, names)
    assert set(found) == {*reasons, "broken giant.png"}
    assert {name: str(error) for name, error in found.items()} == {
        name: str(check_image(tmp_path / name)) for name in found
    }
    few = [name for name in names if not name.startswith("image")]
    assert {name: error.kind for name, error in check_images(tmp_path, few).items()} == {
        name: error.kind for name, error in found.items()
    }


# Odd, and loaded right


@pytest.mark.parametrize(
    ("suffix", "written"), [("jpg", "PNG"), ("png", "JPEG"), ("gif", "WEBP"), ("txt", "BMP"), ("", "GIF")]
)
def test_the_extension_does_not_matter(tmp_path: Path, suffix: str, written: str) -> None:
    path = tmp_path / f"image.{suffix}"
    saved(Image.new("RGB", (16, 16), RED), path, format=written)
    assert check_image(path) is None
    assert np.abs(np.asarray(load_image(path, 8)).astype(int) - RED).max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff", "mpo"])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    path = saved(frames[0], tmp_path / f"image.{suffix}", save_all=True, append_images=frames[1:])
    assert check_image(path) is None
    assert np.abs(np.asarray(load_image(path, 8)).astype(int) - RED).max() <= 6


def write_png(path: Path, depth: int, colour: int, pixel: bytes) -> None:
    """4 x 4 pixels of one colour in any depth and colour type of the PNG standard."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0))
    rows = zlib.compress((b"\0" + pixel * 4) * 4)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("colour", "values", "wanted"),
    [
        (0, (0x8000,), (128, 128, 128)),
        (2, (0xFFFF, 0x8000, 0), (255, 128, 0)),
        (4, (0, 0x8000), (127, 127, 127)),
        (6, (0xFFFF, 0, 0, 0), WHITE),
    ],
)
def test_sixteen_bits_a_channel(tmp_path: Path, colour: int, values: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    path = tmp_path / "image.png"
    write_png(path, 16, colour, struct.pack(f">{len(values)}H", *values))
    assert np.abs(np.asarray(load_image(path)).astype(int) - wanted).max() <= 1


def test_a_cmyk_jpeg_as_photoshop_writes_it(tmp_path: Path) -> None:
    """Adobe's mark says that its channels are stored inverted."""
    plain = tmp_path / "image.jpg"
    saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), plain, quality=95)
    content = plain.read_bytes()
    assert b"Adobe" in content
    assert np.abs(np.asarray(load_image(plain)).astype(int) - RED).max() <= 6


def test_what_a_header_tells_is_told_without_decoding(tmp_path: Path) -> None:
    broken_files(tmp_path)
    for name, reason in (
        ("empty.png", "the file is empty"),
        ("page.jpg", "not an image"),
        ("missing.png", "missing.png"),
    ):
        assert reason in str(check_image(tmp_path / name, decode=False))
    write_huge_palette_png(tmp_path / "huge.png", 30_000, 20_000)
    assert "30000 x 20000 pixels are more than" in str(check_image(tmp_path / "huge.png", decode=False))


# Thumbnails


@pytest.mark.parametrize(
    ("size", "orientation", "wanted"),
    [((400, 100), None, (50, 12)), ((100, 400), None, (12, 50)), ((400, 100), 6, (12, 50)), ((30, 20), None, (30, 20))],
)
def test_a_thumbnail_keeps_its_proportions_and_is_upright(
    tmp_path: Path, size: tuple[int, int], orientation: int | None, wanted: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "white")
    image.paste(RED, (0, 0, size[0] // 2, size[1]))  # red on the left
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = saved(image, tmp_path / "image.png", exif=exif)
    small = images.load_thumbnail(path, 50)
    assert small.size == wanted
    first, last = (2, 2), (wanted[0] - 3, wanted[1] - 3)
    assert small.getpixel(first) == RED  # turned clockwise, the left is at the top
    assert small.getpixel(last) == WHITE
    assert small.size == tuple(np.array(load_image(path).size) * max(small.size) // max(size))


def test_a_thumbnail_of_a_member_of_a_shard(tmp_path: Path) -> None:
    saved(Image.new("RGB", (80, 40), RED), tmp_path / "image.png")
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        archive.add(tmp_path / "image.png", "image.png")
    (member,) = members(tmp_path / "one.tar")
    small = images.load_thumbnail(tmp_path / member.path(tmp_path), 20)
    assert small.size == (20, 10)
    assert small.getpixel((10, 5)) == RED
    with pytest.raises(UnreadableImage, match="pixels are more than"):
        images.load_thumbnail(tmp_path / "image.png", 20, max_pixels=100)


# What step 0 checks is what training reads


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


BROKEN_EXIF = [
    b"\0",
    b"Exif\0\0",
    b"II*\0",
    b"MM\0*\xff\xff\xff\xff",
    b"b'Exif\\x00'",
    b"\0\x08\0\2\1\x12\0\3" * 3,
]


@pytest.mark.parametrize("exif", BROKEN_EXIF)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])  # the library that decodes AVIF refuses these itself
def test_broken_exif_means_no_orientation(tmp_path: Path, suffix: str, exif: bytes) -> None:
    """Healthy pixels beside metadata that are none: accepted by step 0 and by training, in every format."""
    image = Image.new("RGB", (40, 30), RED)
    if suffix == "png":
        whole = saved(image, tmp_path / "image.png").read_bytes()
        (tmp_path / "image.png").write_bytes(whole[:33] + chunk(b"eXIf", exif) + whole[33:])
    else:
        saved(image, tmp_path / f"image.{suffix}", exif=exif)
    path = tmp_path / f"image.{suffix}"
    assert check_image(path) is None
    for size in (None, 8):
        assert np.abs(np.asarray(load_image(path, size)).astype(int) - RED).max() <= 4
    assert load_thumbnail(path, 20).size == (20, 15)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "gif", "bmp", "tiff", "ppm", "avif"])
def test_an_image_passes_the_check_if_and_only_if_it_can_be_read(tmp_path: Path, suffix: str) -> None:
    """Good files of every format with bytes changed, at one size as at another."""
    chance = random.Random(suffix)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    options = {"exif": exif} if suffix in ("png", "webp", "jpg", "avif") else {}
    whole = saved(
        noise.quantize(16) if suffix == "gif" else noise, tmp_path / f"image.{suffix}", **options
    ).read_bytes()
    outcomes = set()
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(min(len(content), 300))] = chance.randrange(256)
        (tmp_path / "changed").write_bytes(content)
        try:
            load_image(tmp_path / "changed", 224)
            is_readable = True
        except UnreadableImage:
            is_readable = False
        assert (check_image(tmp_path / "changed") is None) == is_readable
        outcomes.add(is_readable)
    assert outcomes == {True, False}


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt", b"iCCP"])
def test_metadata_of_megabytes_are_no_fault(tmp_path: Path, kind: bytes) -> None:
    text = bytes(random.Random(0).randrange(97, 123) for _ in range(1000)) * 3000
    content = {
        b"zTXt": b"a\0\0" + zlib.compress(text),
        b"iTXt": b"a\0\1\0\0\0" + zlib.compress(text),
        b"tEXt": b"a\0" + text,
        b"iCCP": b"a\0\0" + zlib.compress(text),
    }[kind]
    whole = saved(Image.new("RGB", (8, 8), RED), tmp_path / "image.png").read_bytes()
    (tmp_path / "image.png").write_bytes(whole[:33] + chunk(kind, content) + whole[33:])
    assert check_image(tmp_path / "image.png") is None
    assert load_image(tmp_path / "image.png").getpixel((3, 3)) == RED


@pytest.mark.parametrize("prefix", ["./", "././", ".//", "./a//"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["b.png", "é.png", "n" * 120 + ".png"])
def test_members_of_any_spelling_are_read(tmp_path: Path, prefix: str, form: int, name: str) -> None:
    photo = saved(Image.new("RGB", (8, 8), RED), tmp_path / "photo.png")
    if form == tarfile.USTAR_FORMAT and len(name) > 100:
        name = "d" * 90 + "/" + "n" * 60 + ".png"
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as archive:
        archive.add(photo, prefix + name)
    (member,) = members(tmp_path / "0.tar")
    path = member.path(tmp_path)
    assert "/./" not in path and "//" not in path
    assert load_image(tmp_path / path).getpixel((3, 3)) == RED
    other = path.replace(name, "other.png")
    assert name == "é.png" or "has changed since" in str(check_image(tmp_path / other))
