"""The reader of Conceptual Captions as img2dataset downloads it, and images that are read in tar shards."""

import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from published_formats import draw, sentence, write_conceptual_captions

from images.files import UnreadableImage, check_image, check_images, load_image
from images.tar_members import file_of, find_member, members, without_place
from pipeline.errors import UserError
from pipeline.registry import READERS
from pipeline.schema import Dataset
from readers.published import Published, outside


def published(root: Path) -> Published:
    return READERS.load("conceptual_captions")(Dataset(source="conceptual_captions", root=str(root)), root, 0)


@pytest.mark.parametrize("tars", [True, False])
@pytest.mark.parametrize("metadata", [True, False])
def test_conceptual_captions(tmp_path: Path, tars: bool, metadata: bool) -> None:
    write_conceptual_captions(tmp_path, 40, 10, tars, metadata)
    source = published(tmp_path)
    rows = list(source.rows())
    assert [row.text for row in rows] == [sentence(number) for number in range(50)]
    assert Counter(row.split for row in rows) == {"train": 40, "test": 10}
    gone = "was not downloaded (HTTP Error 404: Not Found)" if metadata else "is in no shard"
    for number, row in enumerate(rows):
        if number % 10 == 7:
            assert row.rejected == ("missing file", f"https://example.com/{number}.jpg?w=300 {gone}")
            continue
        assert row.rejected is None and row.image_id == without_place(row.image)
        draw(tmp_path / "wanted.jpg", number)
        wanted = np.asarray(load_image(tmp_path / "wanted.jpg"))
        assert np.array_equal(np.asarray(load_image(tmp_path / row.image)), wanted)
    assert rows[17 + 1].label == "Train_GCC-training.tsv line 19"
    key = "train/00001.tar/000010002.jpg" if tars else "train/00001/000010002.jpg"
    assert rows[18].image_id == key
    before = source.fingerprints()
    (tmp_path / "val" / "new.jpg").write_bytes(b"x")
    assert source.fingerprints() != before


def test_many_shards_are_read_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_conceptual_captions(tmp_path, 40, 10, per_shard=4)
    in_processes = list(published(tmp_path).rows())
    monkeypatch.setattr(sys.modules["readers.conceptual_captions"], "SHARDS_WORTH_A_PROCESS", 100)
    assert list(published(tmp_path).rows()) == in_processes


def test_oddities(tmp_path: Path) -> None:
    """img2dataset's instructions add a first line; addresses repeat; lines are broken; a shard is cut short."""
    write_conceptual_captions(tmp_path, 20, 10)
    path = tmp_path / "Train_GCC-training.tsv"
    lines = path.read_text().splitlines()
    path.write_bytes(
        "\n".join(
            ["caption\turl", *lines, f"Another text\t{lines[1].split(chr(9))[1]}", "broken", "a\tb\tc", ""]
        ).encode()
        + b"bad \xff byte\thttps://example.com/2.jpg?w=300\r\n"
    )
    shard = tmp_path / "train" / "00000.tar"
    last = list(members(shard))[-3]
    shard.write_bytes(shard.read_bytes()[: last.first - 100])
    rows = [row for row in published(tmp_path).rows() if row.split == "train"]
    assert rows[0].label == "Train_GCC-training.tsv line 2" and rows[0].text == sentence(0)
    assert rows[20].image == rows[1].image and rows[20].text == "Another text"
    assert [row.rejected and row.rejected[0] for row in rows[21:]] == ["bad row", "bad row", None]
    assert rows[23].text == "bad \udcff byte" and rows[23].image == rows[2].image
    assert rows[15].rejected == ("missing file", "https://example.com/15.jpg?w=300 is not in its shard")


@pytest.mark.parametrize("name", ["Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv", "train", "val"])
def test_it_names_what_is_missing(tmp_path: Path, name: str) -> None:
    write_conceptual_captions(tmp_path, 2, 2)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=rf"looked for {name}.*; found .*elsewhere.* at https://(ai\.google|github)\.com"
    ):
        published(tmp_path)


def test_folders_without_shards(tmp_path: Path) -> None:
    write_conceptual_captions(tmp_path, 2, 2)
    (tmp_path / "train" / "00000.tar").rename(tmp_path / "train" / "00000.zip")
    with pytest.raises(
        UserError, match=r"train holds no shards: looked for NNNNN\.tar or NNNNN/, found 00000\.parquet"
    ):
        published(tmp_path)
    (tmp_path / "val" / "00000.parquet").write_bytes(b"broken")
    (tmp_path / "train" / "00000.zip").rename(tmp_path / "train" / "00000.tar")
    with pytest.raises(UserError, match=r"cannot read .*val/00000\.parquet: .*as img2dataset wrote it"):
        list(published(tmp_path).rows())


# Shards


def write_shard(path: Path, files: dict[str, bytes], **options: object) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (4, 3), number).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_form_of_tar(tmp_path: Path, form: int) -> None:
    names = ["000000001.png", "a folder/x@1+2.png", f"{'long' * 20}/{'name' * 15}.png"]
    names += [] if form == tarfile.USTAR_FORMAT else ["ü" * 60 + "." + "n" * 50 + ".png"]
    write_shard(tmp_path / "s.tar", {name: png(number) for number, name in enumerate(names)}, format=form)
    found = list(members(tmp_path / "s.tar"))
    assert [member.name for member in found] == names
    for number, member in enumerate(found):
        path = tmp_path / member.path(tmp_path)
        assert find_member(path) == member and file_of(path) == tmp_path / "s.tar"
        assert load_image(path).getpixel((0, 0)) == (number,) * 3
        assert outside(tmp_path, member.path(tmp_path)) is None


def test_what_is_wrong_with_members(tmp_path: Path) -> None:
    broken = png(1)[:-30]
    write_shard(
        tmp_path / "s.tar", {"a.png": png(0), "b.png": b"", "c.png": broken, "d.txt": b"text", "../e.png": png(2)}
    )
    reasons = {}
    for member in members(tmp_path / "s.tar"):
        error = check_image(tmp_path / member.path(tmp_path))
        reasons[member.name] = error and str(error)
    assert reasons["a.png"] is None
    assert reasons["b.png"] == "the file is empty"
    assert "truncated" in str(reasons["c.png"])
    assert reasons["d.txt"] == "not an image in a known format"
    assert "leads out of the shard" in str(reasons["../e.png"])
    first = next(members(tmp_path / "s.tar"))
    for wrong, message in (
        (first._replace(first=first.first + 512), "has changed since"),
        (first._replace(size=first.size + 1), "has changed since"),
        (first._replace(first=0), "has changed since"),
        (first._replace(name="other.png"), "has changed since"),
    ):
        with pytest.raises(UnreadableImage, match=message):
            load_image(tmp_path / wrong.path(tmp_path))
    content = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(content[: first.first + 10])
    with pytest.raises(UnreadableImage, match="ends within it"):
        load_image(tmp_path / first.path(tmp_path))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(UnreadableImage, match="s.tar") as caught:
        load_image(tmp_path / first.path(tmp_path))
    assert caught.value.kind == "missing file"


def test_members_that_lead_out_are_no_rows(tmp_path: Path) -> None:
    write_conceptual_captions(tmp_path, 3, 2)
    meta = json.dumps({"url": "https://example.com/0.jpg?w=300"}).encode()
    (tmp_path / "train" / "00000.parquet").unlink()
    write_shard(tmp_path / "train" / "00000.tar", {"../000000000.jpg": png(0), "000000000.json": meta})
    rows = list(published(tmp_path).rows())
    assert rows[0].rejected == ("missing file", "https://example.com/0.jpg?w=300 is not in its shard")
    why = f"s.tar/../x.png@512+9 may lead out of {tmp_path}"
    assert outside(tmp_path, "s.tar/../x.png@512+9") == ("outside the root", why)


def test_a_folder_named_as_a_shard_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "s.tar").mkdir()
    (tmp_path / "s.tar" / "a@1+2").write_bytes(png(7))
    assert find_member(tmp_path / "s.tar" / "a@1+2") is None
    assert load_image(tmp_path / "s.tar" / "a@1+2").size == (4, 3)


def test_members_are_checked_in_processes(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", {f"{n}.png": png(n % 256) if n % 50 else b"x" for n in range(400)})
    names = [member.path(tmp_path) for member in members(tmp_path / "s.tar")]
    assert set(check_images(tmp_path, names)) == {names[n] for n in range(0, 400, 50)}


def test_an_address_that_was_fetched_again_has_its_image(tmp_path: Path) -> None:
    """img2dataset's second pass over the failed addresses writes shards beside the first ones."""
    write_conceptual_captions(tmp_path, 40, 10)
    (number,) = [row.label for row in published(tmp_path).rows() if row.rejected and "/7.jpg" in row.rejected[1]]
    draw(tmp_path / "again.jpg", 7)
    record = {"url": "https://example.com/7.jpg?w=300", "key": "000990000", "status": "success", "error_message": None}
    with tarfile.open(tmp_path / "train" / "00099.tar", "w") as archive:
        archive.add(tmp_path / "again.jpg", "./000990000.jpg")
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "train" / "00099.parquet")
    (row,) = [row for row in published(tmp_path).rows() if row.label == number]
    assert row.rejected is None and row.image_id == "train/00099.tar/000990000.jpg"


@pytest.mark.parametrize("tars", [True, False])
def test_system_files_are_no_shards(tmp_path: Path, tars: bool) -> None:
    """What macOS, Windows and NAS systems leave beside data, and inside of archives."""
    write_conceptual_captions(tmp_path, 40, 10, tars)
    before, watched = list(published(tmp_path).rows()), published(tmp_path).fingerprints()
    for folder in (tmp_path, tmp_path / "train", *(() if tars else (tmp_path / "train" / "00000",))):
        for name in (".DS_Store", "._00000.tar", "._00000.parquet", "._000000000.jpg", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\5\x16\7")
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "00000.tar").write_bytes(b"x")
    assert list(published(tmp_path).rows()) == before
    assert published(tmp_path).fingerprints() == watched
