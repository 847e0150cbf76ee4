"""Files made to do harm: programs in pickles, paths that lead out, bombs, tables and names that are none."""

import io
import itertools
import json
import os
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, TINY, one_line_error, run_script
from PIL import Image
from published_formats import draw, write_coco
from test_sources import published, write_drawing

import prepare_dataset
from images import tar_members as shards
from images.backbones import Backbone
from images.files import check_image
from models import build_model
from pipeline.errors import UserError
from pipeline.files import read_array
from pipeline.pairs import read_pairs
from pipeline.schema import Settings
from pipeline.settings import load_settings
from readers import published as published_module
from readers.manifest import read_manifest
from readers.selection import LONGEST, read_table
from text_space.tokenizer import Tokenizer, strip_markup
from training.checkpoints import load_model_state
from training.runs import read_run

# Pickles


class RunsACommand:
    """When it is unpickled by pickle.load, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def hostile_checkpoint(path: Path, ran: Path, protocol: int) -> None:
    """A checkpoint that would run a command: shown by loading it as nobody should."""
    torch.save({"model": {}, "epoch": RunsACommand(ran)}, path, pickle_protocol=protocol)
    torch.load(path, weights_only=False)
    assert ran.exists(), "the checkpoint is harmless, so the test would show nothing"
    ran.unlink()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_checkpoint_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    path, ran = tmp_path / "best.pt", tmp_path / "ran"
    hostile_checkpoint(path, ran, protocol)
    settings = load_settings(ROOT / "tests" / "tiny.yaml")
    model = build_model(settings.model, np.zeros((9, 16), np.float32), settings.seed)
    with pytest.raises(UserError, match=r"best\.pt is no checkpoint of this model"):
        load_model_state(path, model)
    path.write_bytes(pickle.dumps(RunsACommand(ran), protocol))  # a bare pickle, as torch saved before 1.6
    with pytest.raises(UserError, match=r"best\.pt is no checkpoint of this model"):
        load_model_state(path, model)
    assert not ran.exists()


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
def test_hostile_weights_are_refused_and_do_not_run(tmp_path: Path, backbone: str) -> None:
    path, ran = tmp_path / "weights.pt", tmp_path / "ran"
    hostile_checkpoint(path, ran, 2)
    with pytest.raises(UserError, match=r"cannot load model\.image\.weights .*weights\.pt"):
        Backbone(backbone, str(path))
    assert not ran.exists()


def test_a_hostile_array_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "vectors.npy", tmp_path / "ran"
    np.save(path, np.array([RunsACommand(ran)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"cannot read .*vectors\.npy"):
        read_array(path)
    path.write_bytes(pickle.dumps(RunsACommand(ran)))
    with pytest.raises(UserError, match=r"cannot read .*vectors\.npy: it is no array"):
        read_array(path)
    assert not ran.exists()


def is_pickle(content: bytes) -> bool:
    """Whether a file is one pickle or more, or an archive of torch's, which holds one."""
    try:
        last = max(place for _, _, place in pickletools.genops(content))
    except Exception:
        return False
    return last > 1


@pytest.mark.slow
def test_the_pipeline_writes_no_pickle_but_gensims(prepared: Path) -> None:
    """Checkpoints hold one too, in a zip archive of torch's: they are read by its unpickler of weights only."""
    assert is_pickle(pickle.dumps({"a": 1})) and not is_pickle(b'{"a": 1}')
    run_script("train_cross_modal_retrieval_model.py", "1", "0.3", "0.2", *TINY, "--work", prepared)
    (run,) = (prepared / "runs").iterdir()
    run_script("evaluate.py", "--run", run)
    files = [path for path in prepared.rglob("*") if path.is_file()]
    assert {"pairs.parquet", "vectors.npy", "best.pt", "metrics.json"} <= {path.name for path in files}
    pickles = {path.relative_to(prepared).as_posix() for path in files if is_pickle(path.read_bytes())}
    assert pickles == {"doc2vec/model"}
    assert {path.name for path in files if path.read_bytes()[:2] == b"PK"} == {"best.pt", "last.pt"}
    for path in files:
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)


def test_every_file_is_loaded_by_what_runs_nothing() -> None:
    """Whoever adds a torch.load, np.load or yaml.load says that it is to run nothing."""
    for path in (path for path in ROOT.glob("**/*.py") if not {"tests", ".venv"} & {*path.relative_to(ROOT).parts}):
        text = path.read_text()
        for call, wanted in (
            ("torch.load(", "weights_only=True"),
            ("np.load(", "allow_pickle=False"),
        ):
            for place in [at for at in range(len(text)) if text.startswith(call, at)]:
                assert wanted in text[place : text.index("\n", place)], f"{path.name}: {call}"
        assert not any(word in text for word in ("yaml.load(", "yaml.unsafe", "yaml.full_load", "pickle.load("))
        # gensim unpickles its model: only doc2vec.py does so, from WORK
        assert ("Doc2Vec.load(" in text) == (path == ROOT / "text_space" / "doc2vec.py")


# Paths that lead out of the root


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the root with a photo and a text that no dataset may reach."""
    draw(tmp_path / "outside" / "secret.png", 0)
    draw(tmp_path / "outside" / "secret.jpg", 0)
    (tmp_path / "outside" / "secret.txt").write_text("A secret.")
    (tmp_path / "outside" / "secret.svg").write_text("<svg/>")
    return tmp_path / "outside"


def rejections(rows: Any) -> list[tuple[str, str | None]]:
    return [(row.image, row.rejected and row.rejected[0]) for row in rows]


OUT = ["../outside/secret.png", "link.png", "folder/link.png", "a/../../outside/x.png"]
TABLES, FOLDERS = ("csv", "jsonl", "parquet"), ("karpathy", "coco", "flickr")


@pytest.mark.parametrize(
    ("source", "image"),
    # Before an absolute path the second kind puts the folder of its images, so that it leads to no place outside.
    [*itertools.product(TABLES, [*OUT, "{outside}/secret.png"]), *itertools.product(FOLDERS, OUT)],
)
def test_an_image_outside_the_root_is_rejected(tmp_path: Path, outside: Path, image: str, source: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    image = image.format(outside=outside)
    if source in ("karpathy", "coco"):
        write_coco(root, 3, 2, karpathy=source == "karpathy")
        folder = root / "train2017"
    elif source == "flickr":
        folder = root / "flickr30k_images"
        draw(folder / "good.jpg", 0)
    else:
        folder = root
    (folder / "link.png").symlink_to(outside / "secret.png")
    (outside / "linked").mkdir()
    (outside / "linked" / "link.png").symlink_to(outside / "secret.png")
    (folder / "folder").symlink_to(outside / "linked")  # a folder may be a link, what lies in it may not lead out
    image = image.replace("../outside", "../" * len(folder.relative_to(tmp_path).parts) + "outside")
    if source == "karpathy":
        path = root / "dataset_coco.json"
        content = json.loads(path.read_text())
        for entry in content["images"]:
            entry.update(filepath="train2017", filename=image)
        path.write_text(json.dumps(content))
    elif source == "coco":
        path = root / "annotations" / "captions_train2017.json"
        content = json.loads(path.read_text())
        for entry in content["images"]:
            entry["file_name"] = image
        path.write_text(json.dumps(content))
    elif source == "flickr":
        (root / "results_20130124.token").write_text(f"{image}#0\tA dog.\n")
    elif source == "parquet":
        pq.write_table(pa.table({"image": [image], "text": ["A dog."]}), root / "pairs.parquet")
    elif source == "jsonl":
        (root / "pairs.jsonl").write_text(json.dumps({"image": image, "text": "A dog."}))
    else:
        (root / "pairs.csv").write_text(f"image,text\n{image},A dog.\n")
    if source in ("csv", "jsonl", "parquet"):
        found = rejections(read_manifest(root / f"pairs.{source}", root))
    else:
        found = rejections(published(source="flickr30k" if source == "flickr" else "coco", root=root).rows())
    of_it = [why for name, why in found if "secret" in name or "link" in name or ".." in name]
    assert of_it and set(of_it) <= {"outside the root", "link out of the root"}


@pytest.mark.parametrize("source", ["wikipedia", "tvgraz", "openclipart"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_links_out_of_folders_that_are_listed_are_rejected(
    tmp_path: Path, outside: Path, source: str, kind: str
) -> None:
    root = tmp_path / "root"
    if source == "openclipart":
        write_drawing(root, "food/a", "Apple")
        image, text, out = root / "png" / "food" / "a.png", root / "svg" / "food" / "a.svg", ".svg"
    else:
        folders = ("images/art", "texts") if source == "wikipedia" else ("frog", "frog")
        image, text = root / folders[0] / "a.jpg", root / folders[1] / "a.txt"
        draw(image, 0)
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("A text.")
        out = ".txt"
        if source == "wikipedia":
            (root / "categories.list").write_text("art\n")
            (root / "trainset_txt_img_cat.list").write_text("a\ta\t1\n")
            (root / "testset_txt_img_cat.list").write_text("")
    target, suffix = (image, image.suffix) if kind == "image" else (text, out)
    target.unlink()
    target.symlink_to(outside / f"secret{suffix}")
    ((_, why),) = rejections(published(source=source, root=root).rows())
    assert why in ("outside the root", "link out of the root")


def test_a_category_that_leads_out_is_rejected(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("A text.")
    (root / "categories.list").write_text("../../outside\n")
    (root / "trainset_txt_img_cat.list").write_text("a\tsecret\t1\n../../outside/secret\tsecret\t1\n")
    (root / "testset_txt_img_cat.list").write_text("")
    found = [why for _, why in rejections(published(source="wikipedia", root=root).rows())]
    assert None not in found


def test_preparing_lists_what_leads_out(tmp_path: Path, outside: Path) -> None:
    """From the command line: the rows are in rejected.jsonl, and no pair names a file outside."""
    root, work = tmp_path / "root", tmp_path / "work"
    lines = ["image,text"]
    for number in range(30):
        draw(root / f"{number}.png", number)
        lines.append(f"{number}.png,A text of number {number} about {'abcdefghijklmnopqrstuvwxyzabcdef'[number]}")
    (root / "link.png").symlink_to(outside / "secret.png")
    lines += [f"link.png,x{1}", f"{outside}/secret.png,x2", "../outside/secret.png,x3"]
    (root / "pairs.csv").write_text("\n".join(lines))
    words = ["--dataset.source", "manifest", "--dataset.manifest", str(root / "pairs.csv")]
    prepare_dataset.main([*TINY, *words, "--dataset.near_duplicates", "false", "--work", str(work)])
    rejected = [json.loads(line) for line in (work / "rejected.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in rejected] == ["link out of the root"] + ["outside the root"] * 2
    assert not any("secret" in path or "link" in path for path in read_pairs(work)["image_path"].to_pylist())
    words += ["--dataset.follow_links", "true"]
    prepare_dataset.main([*TINY, *words, "--dataset.near_duplicates", "false", "--work", str(work)])
    assert "link.png" in read_pairs(work)["image_path"].to_pylist()
    assert len((work / "rejected.jsonl").read_text().splitlines()) == 2


# Bombs


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    """A PNG of the declared size with more chunks before its (too few) rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")
    )


def riff(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def webp(width: int, height: int) -> bytes:
    """An animated WebP with a canvas of the declared size and one frame of 8 x 8."""
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "WEBP", lossless=True)
    canvas = b"\2\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = b"\0" * 6 + struct.pack("<I", 7)[:3] * 2 + b"\0" * 4 + small.getvalue()[12:]
    chunks = ((b"VP8X", canvas), (b"ANIM", b"\0" * 6), (b"ANMF", frame))
    return riff(b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks))


def patched(image_format: str, *places: tuple[bytes, bytes], mode: str = "RGB") -> bytes:
    """A small image in a format, with its size replaced."""
    file = io.BytesIO()
    Image.new(mode, (31, 29)).save(file, image_format)
    content = file.getvalue()
    for old, new in places:
        assert old in content
        content = content.replace(old, new, 1)
    return content


def frames() -> bytes:
    """A GIF of 3,000 frames."""
    file = io.BytesIO()
    first, *others = [Image.new("P", (64, 64), number % 2) for number in range(3000)]
    first.save(file, "GIF", save_all=True, append_images=others, optimize=False)
    return file.getvalue()


MEGABYTES = zlib.compress(bytes(300_000_000))
BOMBS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "png.png": (lambda: png(60_000, 60_000), "60000 x 60000 pixels are more than dataset.max_pixels"),
    "text.png": (lambda: png(8, 8, (b"zTXt", b"a\0\0" + MEGABYTES), rows=bytes(72)), "."),
    "itxt.png": (lambda: png(8, 8, (b"iTXt", b"a\0\1\0\0\0" + MEGABYTES), rows=bytes(72)), "."),
    "profile.png": (lambda: png(8, 8, (b"iCCP", b"a\0\0" + MEGABYTES), rows=bytes(72)), "."),
    "rows.png": (lambda: png(8, 8, rows=bytes(300_000_000)), None),
    "webp.webp": (lambda: webp(16_000, 16_000), "16000 x 16000 pixels are more than dataset.max_pixels"),
    "bmp.bmp": (
        lambda: patched("BMP", (struct.pack("<ii", 31, 29), struct.pack("<ii", 60_000, 60_000))),
        "60000 x 60000 pixels are more than dataset.max_pixels",
    ),
    "gif.gif": (
        lambda: patched("GIF", (struct.pack("<HH", 31, 29), struct.pack("<HH", 65_000, 65_000)), mode="P"),
        "65000 x 65000 pixels are more than dataset.max_pixels",
    ),
    "jpeg.jpg": (
        lambda: patched("JPEG", (struct.pack(">HH", 29, 31), struct.pack(">HH", 65_000, 65_000))),
        "65000 x 65000 pixels are more than dataset.max_pixels",
    ),
    "ppm.ppm": (
        lambda: patched("PPM", (b"31 29", b"60000 60000")),
        "60000 x 60000 pixels are more than dataset.max_pixels",
    ),
    "tiff.tiff": (
        lambda: patched(
            "TIFF",
            (struct.pack("<HHII", 256, 4, 1, 31), struct.pack("<HHII", 256, 4, 1, 60_000)),
            (struct.pack("<HHII", 257, 4, 1, 29), struct.pack("<HHII", 257, 4, 1, 60_000)),
        ),
        "60000 x 60000 pixels are more than dataset.max_pixels",
    ),
    "jpeg2000.jp2": (
        lambda: patched("JPEG2000", (struct.pack(">II", 29, 31), struct.pack(">II", 60_000, 60_000))),
        "60000 x 60000 pixels are more than dataset.max_pixels",
    ),
    "frames.gif": (frames, None),
}
MEASURE = """
import resource, sys
from images.files import check_image
check_image(sys.argv[1] + "/harmless.png")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(check_image(sys.argv[1] + "/" + sys.argv[2], max_pixels=100_000_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_told_before_their_pixels_take_memory(tmp_path: Path, name: str) -> None:
    """Each would take 300 MB to 14 GB; a process of its own says how much it took at most."""
    content, message = BOMBS[name]
    (tmp_path / name).write_bytes(content())
    draw(tmp_path / "harmless.png", 0)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), name], capture_output=True, text=True, cwd=ROOT, check=True
    )
    said, kilobytes = done.stdout.splitlines()
    assert (said == "None") if message is None else (message in said and said != "None")
    assert int(kilobytes) < 100_000


def test_declared_sizes_are_looked_at_when_an_image_is_only_headed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(60_000, 60_000))
    assert "dataset.max_pixels" in str(check_image(tmp_path / "a.png", decode=False))


def test_lines_without_an_end_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("published", "delimited"):
        monkeypatch.setattr(f"readers.{name}.LONGEST_LINE", 1000)
    (tmp_path / "p.jsonl").write_text('{"image": "a", "text": "x"}\n' + '{"image": "' + "a" * 5000 + '"}\n[]\n')
    rows = list(read_manifest(tmp_path / "p.jsonl", tmp_path))
    assert [(row.label, bool(row.rejected)) for row in rows] == [("line 1", False), ("line 2", True), ("line 3", True)]
    (tmp_path / "p.csv").write_text("image,text\na.png," + "a" * 5000 + "\n")
    with pytest.raises(UserError, match=r"line 2 is longer than .* characters: it is no table"):
        list(read_manifest(tmp_path / "p.csv", tmp_path))
    file = io.StringIO("a\n" + "b" * 5000 + "\nc" * 2)
    assert list(published_module.lines_of(file)) == [(1, "a\n"), (2, None), (3, "c\n"), (4, "c")]


def test_a_text_that_a_table_holds_once_and_names_often_takes_memory_once(tmp_path: Path) -> None:
    """A Parquet file of some kilobytes: 10,000 rows of one text of 1,000,000 characters would be 10 GB."""
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["long " * 200_000]))
    pq.write_table(pa.table({"image": ["a.png"] * 10_000, "text": one}), tmp_path / "p.parquet", compression="zstd")
    assert (tmp_path / "p.parquet").stat().st_size < 100_000
    rows = read_manifest(tmp_path / "p.parquet", tmp_path)
    texts = {id(next(rows).text) for _ in range(10_000)}
    assert len(texts) == 1


def test_texts_that_no_table_can_hold_are_rejected(tmp_path: Path) -> None:
    long = "x" * (LONGEST + 1)
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "text": [long, "short"]}), tmp_path / "p.parquet")
    table, rejected = read_table(read_manifest(tmp_path / "p.parquet", tmp_path))
    assert {row: why.kind for row, why in rejected.items()} == {0: "long text"}
    assert table["text"].to_pylist() == ["", "short"]


@pytest.mark.parametrize("part", ["<!--", "<script>", "\u0301\u0316", "&amp;", "<a ", "</script "])
def test_texts_made_to_be_slow_are_linear(part: str) -> None:
    """Counted in steps of the clock of this process they took minutes to hours; here they end at all."""
    chosen = Settings()
    chosen.text.max_sentences = None
    text = part * (1_000_000 // len(part))
    assert isinstance(Tokenizer(chosen.text, chosen.dataset.language, {}).words(text), list)
    assert len(strip_markup(text)) <= len(text)


# Archives


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def test_members_that_are_no_files_or_lead_out_are_not_read(tmp_path: Path) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for info, content in (
            member("good.png", content=photo.getvalue()),
            member("../out.png", content=photo.getvalue()),
            member("/abs.png", content=photo.getvalue()),
            member("link.png", tarfile.SYMTYPE, "/etc/passwd"),
            member("hard.png", tarfile.LNKTYPE, "good.png"),
            member("device.png", tarfile.CHRTYPE),
            member("pipe.png", tarfile.FIFOTYPE),
            member("folder.png", tarfile.DIRTYPE),
        ):
            archive.addfile(info, io.BytesIO(content))
    found = {found.name: found for found in shards.members(tmp_path / "0.tar")}
    assert set(found) == {"good.png", "../out.png", "/abs.png"}
    assert check_image(tmp_path / found["good.png"].path(tmp_path)) is None
    for name in ("../out.png", "/abs.png"):
        assert "leads out of the shard" in str(check_image(found[name].path(Path("/")).join(["/", ""])))


SIZES = [b"99999999999\0", b"-0000001000\0", b"-0000007000\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"777777777777"]


def header(size: bytes, kind: bytes = b"0") -> bytes:
    """The block in front of a member that says how large it is."""
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S"])
def test_headers_of_archives_are_not_taken_at_their_word(
    tmp_path: Path, size: bytes, kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size below 0 led tarfile back to where it had been, for ever, and one of gigabytes made it ask for as much."""
    looked, look = [], tarfile.TarFile.next

    def counted(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        looked.append(archive.offset)
        assert len(looked) < 100, "it goes round in circles"
        return look(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    (tmp_path / "0.tar").write_bytes(header(b"00000000000\0") + header(size, kind) * 3 + bytes(1024))
    assert len(list(shards.members(tmp_path / "0.tar"))) <= 4


def test_a_path_that_says_too_large_a_place_asks_for_no_memory(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(*(lambda info, content: (info, io.BytesIO(content)))(*member("a.png", content=b"x" * 600)))
    for place in ("512+99999999999999999", "99999999999999999999999+1", "512+" + "9" * 5000, "0+0", "1+600"):
        assert check_image(tmp_path / f"a.tar/a.png@{place}") is not None
    (tmp_path / "b.tar").write_bytes(header(b"77777777777\0") + bytes(1024))
    assert "b.tar ends within it" in str(check_image(tmp_path / f"b.tar/a.png@512+{8**11 - 1}"))


def test_links_to_shards_outside_are_rejected(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(outside / "a.tar", "w") as archive:
        archive.add(outside / "secret.png", "secret.png")
    (root / "a.tar").symlink_to(outside / "a.tar")
    (found,) = shards.members(root / "a.tar")
    (root / "p.csv").write_text(f"image,text\n{found.path(root)},A secret.\n")
    assert [why for _, why in rejections(read_manifest(root / "p.csv", root))] == ["link out of the root"]


# Texts


def test_markup_stays_text_and_is_no_word() -> None:
    text = '<script>alert("x")</script><img src=x onerror=alert(1)>A <b>cat</b> &lt;script&gt;sat&lt;/script&gt; <3'
    chosen = Settings()
    chosen.text.max_sentences = None
    assert Tokenizer(chosen.text, chosen.dataset.language, {}).words(text) == ["cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "image,text,text\na,b,c\n", "more than one column text"),
        ("p.csv", '\ufeffimage,text\r\na.png,"one\r\n', "a quote is opened and never closed"),
        ("p.tsv", "image\n", "no column text"),
        ("p.parquet", "PAR1" + "\0" * 40 + "PAR1", "cannot read"),
    ],
)
def test_hostile_manifests_end_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    words = ["--dataset.source", "manifest", "--dataset.manifest", tmp_path / name, "--work", tmp_path / "work"]
    assert message in one_line_error(run_script("prepare_dataset.py", *TINY, *words, ok=False))
    assert not list((tmp_path / "work").glob("*.parquet"))


def test_rows_that_are_no_text_are_rejected_and_the_others_kept(tmp_path: Path) -> None:
    invalid = pa.array([b"good", b"\xff\xfe", b"a\0b", b"\xed\xa0\x80"], pa.binary()).view(pa.string())
    table = pa.table({"image": ["a.png", "b.png", "c\0.png", "d.png"], "text": invalid})
    pq.write_table(table, tmp_path / "p.parquet")
    found, rejected = read_table(read_manifest(tmp_path / "p.parquet", tmp_path))
    assert {row: why.kind for row, why in rejected.items() if row != 2} == {1: "bad row", 3: "bad row"}
    assert found["text"][0].as_py() == "good"
    pq.write_table(pa.table({"image": ["a.png"], "text": [[{"a": 1}]]}), tmp_path / "n.parquet")
    _, rejected = read_table(read_manifest(tmp_path / "n.parquet", tmp_path))
    assert rejected[0].kind == "bad row" and "is no text" in rejected[0].detail


@pytest.mark.parametrize("caption", [5, None, ["a"], {"a": 1}, True])
@pytest.mark.parametrize("karpathy", [True, False])
def test_captions_that_are_no_texts_are_rejected(tmp_path: Path, caption: object, karpathy: bool) -> None:
    write_coco(tmp_path, 3, 2, karpathy)
    path = tmp_path / ("dataset_coco.json" if karpathy else "annotations/captions_train2017.json")
    content = json.loads(path.read_text())
    if karpathy:
        content["images"][0]["sentences"][0]["raw"] = caption
    else:
        content["annotations"][0]["caption"] = caption
    path.write_text(json.dumps(content))
    table, rejected = read_table(published(source="coco", root=tmp_path).rows())
    assert rejected[0].kind == "bad row" and "is no text" in rejected[0].detail and len(rejected) == 1
    assert len(table) > 10


# Settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nan", "0", "0"], "the weight SYM is nan"),
        (["1", "-1", "0"], "the weight IMG is -1 and must be a finite number, 0 or more"),
        (["1e999", "0", "-2"], "the weight SYM is inf .*; the weight TEXT is -2 "),
        (["1", "0", "0", "--training.batch_size", "0", "--loss.margin", "x"], "training.batch_size.*loss.margin"),
        (["1", "-1", "0", "--training.batch_size", "0"], "training.batch_size is 0 .*; the weight IMG is -1"),
    ],
)
def test_mistakes_of_the_command_line_are_listed_before_anything_is_read(
    tmp_path: Path, words: list[str], message: str
) -> None:
    done = run_script("train_cross_modal_retrieval_model.py", *TINY, *words, "--work", tmp_path / "no", ok=False)
    assert re.search(message, one_line_error(done))
    assert not (tmp_path / "no").exists()


def test_a_hostile_config_of_a_run_is_refused(tmp_path: Path) -> None:
    for text in (
        "!!python/object/apply:os.system ['touch ran']",
        yaml.safe_dump({"weights": {"sym": "x", "img": 1, "text": 1}, "evaluation": {"batch_size": 1}}),
        yaml.safe_dump({"weights": {"sym": 1, "img": 1, "text": 1}, "evaluation": {"batch_size": -1}}),
        yaml.safe_dump({"weights": {"sym": 1, "img": 1, "text": 1}, "evaluation": {"batch_size": 1}, "training": 3}),
        "[" * 5000,
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml.*; train the run anew with --overwrite"):
            read_run(tmp_path)


# Bad images


def test_one_in_a_hundred_images_is_broken_and_the_others_are_prepared(tmp_path: Path) -> None:
    """Cut off, zeroes in the middle, another file under an image's name: each rejected with its reason, none more."""
    lines = ["image,text"]
    for number in range(200):
        path = tmp_path / f"{number}.png"
        draw(path, number)
        lines.append(f"{number}.png,Text number {number} {'abcdefghij'[number % 10]} {number * 7919}")
    whole = (tmp_path / "17.png").read_bytes()
    (tmp_path / "17.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "117.png").write_bytes(b"<html><body>404</body></html>")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    words = ["--dataset.source", "manifest", "--dataset.manifest", tmp_path / "pairs.csv", "--work", tmp_path / "work"]
    shown = run_script("prepare_dataset.py", *TINY, *words, "--dataset.near_duplicates", "false").stdout
    rejected = [json.loads(line) for line in (tmp_path / "work" / "rejected.jsonl").read_text().splitlines()]
    assert {record["image"]: record["kind"] for record in rejected} == {
        "17.png": "unreadable image",
        "117.png": "unreadable image",
    }
    assert all(record["reason"] for record in rejected)
    assert len(read_pairs(tmp_path / "work")) == 198
    assert "unreadable image                    -2" in shown
