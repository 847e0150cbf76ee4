"""One's own pairs as people have them: the fourteen manifests of docs/data.md, step 0 run on each in this process."""

import ast
import base64
import csv
import gzip
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image
from published_formats import draw, sentence

import prepare_dataset
from images.files import check_image, load_image
from pipeline.errors import UserError
from pipeline.pairs import SPLITS, image_root
from pipeline.registry import READERS
from pipeline.schema import Dataset
from readers.columns import choose_columns
from readers.manifest import read_manifest
from readers.published import outside, placed
from readers.rejections import REMEDIES
from readers.selection import assign_splits
from readers.split_names import splits_by_name
from readers.webdataset import webdataset

Table = list[dict[str, Any]]
Words = list[str]


def table(count: int = 24) -> Table:
    """Pairs with all that a manifest may hold but splits, which step 0 draws."""
    return [
        {"image": f"{n}.png", "text": sentence(n), "image_id": f"i{n}", "category": f"c{n % 3}"} for n in range(count)
    ]


def step_0(work: Path, *words: str) -> str:
    """Run step 0 as a user with configs/my_data.yaml does; returns what it prints."""
    printed = io.StringIO()
    config = ["--config", str(ROOT / "configs" / "my_data.yaml"), "--dataset.near_duplicates", "false"]
    with redirect_stdout(printed):
        prepare_dataset.main([*config, *words, "--work", str(work)])
    return printed.getvalue()


def pairs(work: Path) -> Table:
    return pq.read_table(work / "pairs.parquet").to_pylist()


def rejected(work: Path) -> Table:
    return [json.loads(line) for line in (work / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def draw_all(folder: Path, records: Table) -> None:
    for number, record in enumerate(records):
        draw(folder / record["image"], number)


def as_csv(records: Table, delimiter: str = ",", end: str = "\n", **names: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow([names.get(name, name) for name in records[0]])
    writer.writerows(record.values() for record in records)
    return file.getvalue().encode()


def as_jsonl(records: Table) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def manifest(path: Path, content: bytes, images: Table) -> Words:
    """A manifest with its images, and the words of the command line that name it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    draw_all(path.parent, images)
    return ["--dataset.manifest", str(path)]


# The same table in every format


def parquet(path: Path, records: Table) -> Words:
    pq.write_table(pa.Table.from_pylist(records), path)
    draw_all(path.parent, records)
    return ["--dataset.manifest", str(path)]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shards(folder: Path, records: Table) -> Words:
    draw_all(folder / "drawn", records)
    files = []
    for number, record in enumerate(records):
        files.append((f"{number:04}.png", (folder / "drawn" / record["image"]).read_bytes()))
        files.append((f"{number:04}.json", json.dumps({**record, "image": "elsewhere"}).encode()))
    write_tar(folder / "shards" / "00000.tar", files[:20])
    write_tar(folder / "shards" / "00001.tar", files[20:])
    return ["--dataset.source", "webdataset", "--dataset.root", str(folder / "shards")]


def with_bytes(folder: Path, records: Table) -> pa.Table:
    """The table as Hugging Face's library holds it: each image's file in a struct."""
    draw_all(folder / "drawn", records)
    images = [
        {"bytes": (folder / "drawn" / record["image"]).read_bytes(), "path": record["image"]} for record in records
    ]
    return pa.Table.from_pylist([{**record, "image": image} for record, image in zip(records, images, strict=True)])


def huggingface_parquet(folder: Path, records: Table) -> Words:
    (folder / "hub" / "data").mkdir(parents=True)
    pq.write_table(with_bytes(folder, records), folder / "hub" / "data" / "train-00000-of-00001.parquet")
    return ["--dataset.source", "huggingface", "--dataset.root", str(folder / "hub")]


def saved_to_disk(folder: Path, records: Table) -> Words:
    """What save_to_disk writes; an Arrow file that state.json does not list is an older one's."""
    content = with_bytes(folder, records)
    (folder / "saved").mkdir()
    for name, part in (("data-00000-of-00001.arrow", content), ("data-00000-of-00002.arrow", content.slice(0, 3))):
        with pa.ipc.new_stream(folder / "saved" / name, part.schema) as writer:
            writer.write_table(part, max_chunksize=5)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "saved" / "state.json").write_text(json.dumps(state))
    return ["--dataset.source", "huggingface", "--dataset.root", str(folder / "saved")]


FORMATS: dict[str, Callable[[Path, Table], Words]] = {
    "csv": lambda path, records: manifest(path / "p.csv", as_csv(records), records),
    "tsv": lambda path, records: manifest(path / "p.tsv", as_csv(records, "\t"), records),
    "csv.gz": lambda path, records: manifest(path / "p.csv.gz", gzip.compress(as_csv(records)), records),
    "jsonl": lambda path, records: manifest(path / "p.jsonl", as_jsonl(records), records),
    "jsonl.gz": lambda path, records: manifest(path / "p.jsonl.gz", gzip.compress(as_jsonl(records)), records),
    "json": lambda path, records: manifest(path / "p.json", json.dumps(records, indent=1).encode(), records),
    "json with a record a line": lambda path, records: manifest(path / "p.json", as_jsonl(records), records),
    "parquet": lambda path, records: parquet(path / "p.parquet", records),
    "webdataset": shards,
    "huggingface, parquet": huggingface_parquet,
    "huggingface, saved to disk": saved_to_disk,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_table_is_the_same_dataset_in_every_format(tmp_path: Path, name: str) -> None:
    """Pair by pair: the ids, texts, categories, the splits that are drawn, and the pixels."""
    records = table()
    (tmp_path / name).mkdir()
    printed = step_0(tmp_path / "work", *FORMATS[name](tmp_path / name, records))
    assert not rejected(tmp_path / "work")
    assert "published rows                        24" in printed
    kept = pairs(tmp_path / "work")
    assert [(row["image_id"], row["text"], row["category"]) for row in kept] == [
        (record["image_id"], record["text"], record["category"]) for record in records
    ]
    drawn = assign_splits(np.arange(24), [record["image_id"] for record in records], None, 0, None, 0.1)
    assert [row["split"] for row in kept] == [SPLITS[number] for number in drawn]
    root = image_root(tmp_path / "work")
    for number in (0, 11, 23):
        draw(tmp_path / "wanted.png", number)
        wanted = np.asarray(load_image(tmp_path / "wanted.png"))
        assert np.array_equal(np.asarray(load_image(root / kept[number]["image_path"])), wanted)


# The fourteen manifests of docs/data.md


def test_1_byte_order_mark_crlf_and_line_breaks_in_quotes(tmp_path: Path) -> None:
    records = table()
    records[3]["text"] = 'He said "no",\nand left.\r\nThe end'
    content = b"\xef\xbb\xbf" + as_csv(records, end="\r\n")
    step_0(tmp_path / "work", *manifest(tmp_path / "p.csv", content, records))
    assert [row["text"] for row in pairs(tmp_path / "work")] == [record["text"] for record in records]
    assert not rejected(tmp_path / "work")


def test_2_tab_separated(tmp_path: Path) -> None:
    printed = step_0(tmp_path / "work", *manifest(tmp_path / "p.tsv", as_csv(table(), "\t"), table()))
    assert printed.startswith("p.tsv, tab-separated: image, text, image_id, category\n")
    assert len(pairs(tmp_path / "work")) == 24


def test_3_nested_fields_of_json_lines(tmp_path: Path) -> None:
    records = [{"photo": {"file": r["image"]}, "meta": {"about": {"caption": r["text"]}}} for r in table()]
    words = manifest(tmp_path / "p.jsonl", as_jsonl(records), table())
    with pytest.raises(UserError, match=r"its columns are: photo, photo\.file, meta, meta\.about; dataset\.columns"):
        step_0(tmp_path / "work", *words)
    words += ["--dataset.columns.image", "photo.file", "--dataset.columns.text", "meta.about.caption"]
    assert "image from 'photo.file', text from 'meta.about.caption'" in step_0(tmp_path / "work", *words)
    assert [row["text"] for row in pairs(tmp_path / "work")] == [record["text"] for record in table()]


def test_4_parquet_with_other_names_of_columns(tmp_path: Path) -> None:
    draw_all(tmp_path, table())
    columns = {"filepath": [r["image"] for r in table()], "caption": [r["text"] for r in table()]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    printed = step_0(tmp_path / "work", "--dataset.manifest", str(tmp_path / "p.parquet"))
    assert printed.startswith("p.parquet: image from 'filepath', text from 'caption'\n")
    assert len(pairs(tmp_path / "work")) == 24


def test_5_absolute_paths(tmp_path: Path) -> None:
    """Those in the root are as good as relative ones, however links spell them. Others say what to set."""
    root = tmp_path / "disk" / "photos"
    draw_all(root, table())
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    records = table()
    for number, record in enumerate(records):
        record["image"] = f"{root if number % 2 else tmp_path / 'link' / 'photos'}/{record['image']}"
    draw(tmp_path / "elsewhere.png", 0)
    records.append({**records[0], "image": f"{tmp_path}/elsewhere.png", "image_id": "other"})
    words = manifest(tmp_path / "p.csv", as_csv(records), [])
    step_0(tmp_path / "work", *words, "--dataset.root", str(root))
    assert [row["image_path"] for row in pairs(tmp_path / "work")] == [record["image"] for record in table()]
    (row,) = rejected(tmp_path / "work")
    assert row["kind"] == "outside the root" and "set dataset.root to a folder that holds all" in row["remedy"]


HEIC = base64.b85decode(
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0004eZDn*}000000000XXk=`10000000000aA{+700000000000000000000B57=IV*mgE07O6l"
    "0RRC200001pa1~?00000001Tc001LtX>Mi!000000RR916=`l}WdZ;I000310BCk&F#rGn01j|zbZr0t000010002|X>f9I0002oX>en20001W"
    "Xm(>m0RwOV0058x000009`FGC{rLC*01pFT0096PKmiN^|NjGU00093kN^M!000939=ZZRVE_RDDMA4O18@KU0|1Z!00RI30{|YNAb|yz>aLpR"
    ";31&EfB*mtfB*mk0EA)y0RRR>0l{;@i2wiq6Ju{|a&BX6cmM$a4FCp!0000KX>)L8000000000$0000$0000eV{Bn?0000G000010000G00001"
    "|NsBc00002|NsBc000020000GaA|mH000000|*ER0000OX>e^}0000000001009Mo0s{qv0000kZDe6|0000YC;_ho5)(||`02uEKiFmX9##JD"
    "C+({%<4K=)u^5u6|DX"
)
"""16 x 16 red pixels."""


def test_6_names_and_formats_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks, upper-case extensions, WebP, AVIF, CMYK, 16 bits; HEIC says what to install."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    records = table()
    names = ["a photo (1).JPG", "B.PNG", "c.webp", "d.avif", "e.jpg", "f.png", "g.HEIC"]
    for number, name in enumerate(names[:4]):
        draw(tmp_path / name, number)
    Image.new("CMYK", (20, 10), (10, 200, 30, 0)).save(tmp_path / "e.jpg")
    Image.fromarray(np.full((10, 20), 40_000, np.uint16)).save(tmp_path / "f.png")
    (tmp_path / "g.HEIC").write_bytes(HEIC)
    words = manifest(tmp_path / "p.csv", b"", records)
    for record, name in zip(records, names, strict=False):
        record["image"] = name
    records[0]["image"] = f" {names[0]} "  # of blanks around a path none need be meant
    (tmp_path / "p.csv").write_bytes(as_csv(records))
    step_0(tmp_path / "work", *words)
    assert [row["image_path"] for row in pairs(tmp_path / "work")][:6] == names[:6]
    (row,) = rejected(tmp_path / "work")
    assert row["image"] == "g.HEIC" and "pillow-heif" in row["reason"] and "install pillow-heif" in row["remedy"]


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    (tmp_path / "a.heic").write_bytes(HEIC)
    write_tar(tmp_path / "a.tar", [("a.heic", HEIC)])
    for name in ("a.heic", f"a.tar/a.heic@512+{len(HEIC)}"):
        assert check_image(tmp_path / name) is None
        red, green, blue = np.asarray(load_image(tmp_path / name))[8, 8]
        assert red > 150 and green < 80 and blue < 90
    assert "dataset.max_pixels" in str(check_image(tmp_path / "a.heic", max_pixels=100))


@pytest.mark.parametrize(("count", "is_enough"), [(20, True), (6, True), (3, False), (1, False)])
def test_7_few_pairs(tmp_path: Path, count: int, is_enough: bool) -> None:
    words = manifest(tmp_path / "p.csv", as_csv(table(count)), table(count))
    if is_enough:
        step_0(tmp_path / "work", *words)
        assert {row["split"] for row in pairs(tmp_path / "work")} == {"train", "val", "test"}
        return
    with pytest.raises(UserError, match="needed are 6 images, 2 a split; for figures that mean something, hundreds"):
        step_0(tmp_path / "work", *words)


def test_8_very_long_texts(tmp_path: Path) -> None:
    records = table()
    records[0]["text"] = "word " * 150_000
    records[1]["text"] = "word " * 250_000
    step_0(tmp_path / "work", *manifest(tmp_path / "p.csv", as_csv(records), records))
    assert max(len(row["text"]) for row in pairs(tmp_path / "work")) == 749_999
    (row,) = rejected(tmp_path / "work")
    assert row["kind"] == "long text" and "cut the text off" in row["remedy"]


def test_9_open_clips_csv_is_separated_by_tabs(tmp_path: Path) -> None:
    records = [{"image": record["image"], "text": record["text"] + ", or so; yes"} for record in table()]
    content = as_csv(records, "\t", image="filepath", text="title")
    printed = step_0(tmp_path / "work", *manifest(tmp_path / "train.csv", content, records))
    assert printed.startswith("train.csv, tab-separated: image from 'filepath', text from 'title'\n")
    assert [row["text"] for row in pairs(tmp_path / "work")] == [record["text"] for record in records]


def test_10_excels_csv_is_separated_by_semicolons(tmp_path: Path) -> None:
    records = [{"image": record["image"], "text": record["text"] + ', "so"; yes'} for record in table()]
    content = b"\xef\xbb\xbf" + as_csv(records, ";", "\r\n", image=" Image ", text="TEXT")
    printed = step_0(tmp_path / "work", *manifest(tmp_path / "p.csv", content, records))
    assert printed.startswith("p.csv, semicolon-separated: image from 'Image', text from 'TEXT'\n")
    assert [row["text"] for row in pairs(tmp_path / "work")] == [record["text"] for record in records]


@pytest.mark.parametrize("damage", ["cut off", "no gzip"])
def test_11_packed_tables_that_are_damaged(tmp_path: Path, damage: str) -> None:
    """Good ones are in test_the_same_table_is_the_same_dataset_in_every_format."""
    packed = gzip.compress(as_csv(table()))
    content = packed[:-40] if damage == "cut off" else as_csv(table())
    words = manifest(tmp_path / "p.csv.gz", content, table())
    with pytest.raises(UserError, match=r"cannot read .*p\.csv\.gz: .*; save it again"):
        step_0(tmp_path / "work", *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [],\n"annotations": []}', "holds no list of records, nor a record a line"),
        ('"text"', "holds no list of records, nor a record a line"),
        ("", "holds no list of records, nor a record a line"),
        ('[{"image": "a.png", "text": "x"}', "ends before its last bracket"),
        ('[{"image": "a.png", "text": "x"} {}]', "a comma is missing"),
    ],
)
def test_12_json_that_is_no_list(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=message):
        step_0(tmp_path / "work", "--dataset.manifest", str(tmp_path / "p.json"))


def test_12_an_item_of_a_json_list_without_an_end_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("readers.published.LONGEST_LINE", 1000)
    (tmp_path / "p.json").write_text('[{"image": "a.png", "text": "x"}, {"text": "' + "a" * 5_000_000)
    with pytest.raises(UserError, match="an item is longer than"):
        list(read_manifest(tmp_path / "p.json", tmp_path))


def test_13_hugging_faces_splits_lists_of_captions_and_names_of_categories(tmp_path: Path) -> None:
    """COCO's like: two captions an image; an image twice is one; a row without bytes says what to do."""
    records = [{**record, "text": [record["text"], sentence(100 + 3 * n)]} for n, record in enumerate(table())]
    content = with_bytes(tmp_path, records).drop_columns(["image_id", "category"])
    content = content.append_column("label", pa.array([n % 3 for n in range(24)]))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["pets", "stars", "court"]}}
    content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    lost = content.slice(0, 1).set_column(
        0, "image", pa.array([{"bytes": None, "path": "a.png"}], content["image"].type)
    )
    root = tmp_path / "hub"
    for name, part in (
        ("train/0000.parquet", pa.concat_tables([content.slice(0, 20), content.slice(0, 1), lost])),
        ("validation/0000.parquet", content.slice(20)),
    ):
        (root / name).parent.mkdir(parents=True)
        pq.write_table(part, root / name)
    words = ["--dataset.source", "huggingface", "--dataset.root", str(root), "--dataset.columns.category", "label"]
    assert "0000.parquet: image, text, category from 'label'" in step_0(tmp_path / "work", *words)
    kept = pairs(tmp_path / "work")
    assert len(kept) == 48 and len({row["image_id"] for row in kept}) == 24
    assert {row["split"] for row in kept[40:]} == {"test"} and {row["split"] for row in kept[:40]} == {"train", "val"}
    assert [row["category"] for row in kept[:6]] == ["pets", "pets", "stars", "stars", "court", "court"]
    assert [row["text"] for row in kept] == [text for record in records for text in record["text"]]
    told = {row["row"]: row["reason"] for row in rejected(tmp_path / "work")}
    assert told.pop("train/0000.parquet row 22") == "bad row: holds no image: save it with its bytes, not only its path"
    assert told == {
        f"train/0000.parquet row 21 text {n}": f"duplicate of train/0000.parquet row 1 text {n}" for n in (1, 2)
    }
    shards_of_it = [path.stat().st_mtime_ns for path in (tmp_path / "work" / "published").rglob("*.tar")]
    assert step_0(tmp_path / "work", *words).startswith("up to date")
    assert shards_of_it == [path.stat().st_mtime_ns for path in (tmp_path / "work" / "published").rglob("*.tar")]
    pq.write_table(content.slice(0, 12), root / "train" / "0000.parquet")
    step_0(tmp_path / "work", *words)
    assert len(pairs(tmp_path / "work")) == 32


def test_13_tables_that_hold_no_images_are_told(tmp_path: Path) -> None:
    words = ["--dataset.source", "huggingface", "--dataset.root", str(tmp_path)]
    pq.write_table(pa.Table.from_pylist(table()), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"holds paths of images; take dataset\.source manifest"):
        step_0(tmp_path / "work", *words)
    pq.write_table(with_bytes(tmp_path, table()), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"holds the images themselves; take dataset\.source huggingface"):
        step_0(tmp_path / "work", "--dataset.manifest", str(tmp_path / "p.parquet"))
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing PAR1")
    with pytest.raises(UserError, match=r"cannot read .*p\.parquet: "):
        step_0(tmp_path / "work", *words)
    (tmp_path / "p.parquet").rename(tmp_path / "p.arrow")
    with pytest.raises(UserError, match=r"cannot read .*p\.arrow: "):
        step_0(tmp_path / "work", *words)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_13_a_damaged_table_is_rows_or_one_line(tmp_path: Path, suffix: str) -> None:
    """Bytes of a good table are replaced, with 60 seeds: Arrow raises of its own, of Unicode, of keys."""
    content = with_bytes(tmp_path, table(3))
    good = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        pq.write_table(content, good)
    else:
        with pa.ipc.new_stream(good, content.schema) as writer:
            writer.write_table(content)
    octets, told = good.read_bytes(), 0
    for seed in range(60):
        chance = np.random.default_rng(seed)
        changed = bytearray(octets)
        for place in chance.integers(0, min(len(octets), 1500), 4):  # in front, or at the end, is what says how to read
            changed[-place - 1 if suffix == ".parquet" else place] = chance.integers(256)
        root = tmp_path / str(seed)
        root.mkdir()
        (root / good.name).write_bytes(changed)
        dataset = Dataset(source="huggingface", root=str(root))
        try:
            list(READERS.load("huggingface")(dataset, root / "work", 0).rows())
        except UserError:
            told += 1
    assert told > 5


def test_14_a_folder(tmp_path: Path) -> None:
    """Pictures and texts of one name, in folders that may be links. What has no counterpart is named."""
    root, disk = tmp_path / "root", tmp_path / "disk"
    root.mkdir()
    for number in range(24):
        folder = root / "a" if number < 12 else disk
        draw(folder / f"{number:02} x.JPG", number, format="JPEG")
        (folder / f"{number:02} x.txt").write_text(sentence(number) + "\n")
    (root / "linked").symlink_to(disk)
    (root / "a" / "loop").symlink_to(root)
    draw(root / "alone.png", 0)
    (root / "note.txt").write_text("A text without a picture.")
    draw(root / "two.png", 1)
    draw(root / "two.webp", 1)
    (root / "two.txt").write_text("Which of them?")
    (root / "a" / "secret.txt").symlink_to("/etc/hostname")
    draw(root / "a" / "secret.png", 2)
    step_0(tmp_path / "work", "--dataset.source", "folder", "--dataset.root", str(root))
    kept = pairs(tmp_path / "work")
    assert [row["text"] for row in kept] == [sentence(number) for number in range(24)]
    assert [row["image_path"] for row in kept][11:13] == ["a/11 x.JPG", "linked/12 x.JPG"]
    assert {row["row"]: row["kind"] for row in rejected(tmp_path / "work")} == {
        "a/secret.png": "outside the root",
        "alone.png": "no text",
        "note.txt": "missing file",
        "two.png": "ambiguous file",
    }


def test_15_shards_of_anybodys_own_and_of_img2dataset(tmp_path: Path) -> None:
    """Texts in .txt or .json, splits by the names of folders, a shard that is cut off."""
    records = table()
    draw_all(tmp_path / "drawn", records)
    octets = [(tmp_path / "drawn" / record["image"]).read_bytes() for record in records]
    files: list[tuple[str, bytes]] = []
    for number, record in enumerate(records):
        meta = {
            "caption": record["text"],
            "url": "https://example.com/1.jpg",
            "key": f"{number:09}",
            "status": "success",
        }
        files += [(f"{number:09}.png", octets[number]), (f"{number:09}.txt", record["text"].encode())]
        files += [(f"{number:09}.json", json.dumps(meta).encode())]
    root = tmp_path / "root"
    write_tar(root / "train" / "00000.tar", [*files[:54], ("a/x.png", octets[0]), ("b/x.txt", b"no picture")])
    write_tar(root / "test" / "00000.tar", [file for file in files[54:] if not file[0].endswith(".txt")])
    write_tar(
        root / "train" / "00001.tar", [("y.png", octets[1]), ("y.txt", b"A text of its own"), ("z.png", octets[2])]
    )
    whole = (root / "train" / "00001.tar").read_bytes()
    (root / "train" / "00001.tar").write_bytes(whole[: 4 * 512 + 512 * -(-len(octets[1]) // 512) + 100])
    step_0(tmp_path / "work", "--dataset.source", "webdataset", "--dataset.root", str(root))
    kept = pairs(tmp_path / "work")
    assert [row["text"] for row in kept] == [
        *(record["text"] for record in records[18:]),
        *(record["text"] for record in records[:18]),
        "A text of its own",
    ]
    assert [row["split"] for row in kept[:6]] == ["test"] * 6 and "test" not in [row["split"] for row in kept[6:]]
    assert kept[0]["image_id"] == "test/00000.tar/000000018.png"
    assert {row["row"]: row["kind"] for row in rejected(tmp_path / "work")} == {
        "train/00000.tar a/x": "empty text",
        "train/00000.tar b/x": "bad row",
        "train/00001.tar z": "empty text",
        "train/00001.tar ": "bad row",
    }


def test_15_packed_shards_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no tar shards: .*; unpack a\.tar\.gz and its like with gunzip"):
        step_0(tmp_path / "work", "--dataset.source", "webdataset", "--dataset.root", str(tmp_path))


def test_15_many_shards_are_read_in_processes(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 0)
    octets = (tmp_path / "a.png").read_bytes()
    for number in range(6):
        write_tar(tmp_path / "root" / f"{number}.tar", [("a.png", octets), ("a.txt", f"Text {number}".encode())])
    rows = list(webdataset(Dataset(source="webdataset", root=str(tmp_path / "root")), tmp_path, 0).rows())
    assert [(row.image_id, row.text) for row in rows] == [(f"{n}.tar/a.png", f"Text {n}") for n in range(6)]


# Columns


@pytest.mark.parametrize(
    ("found", "named", "chosen"),
    [
        (["image", "text", "title"], {}, {"image": "image", "text": "text"}),
        ([" IMAGE", "Caption"], {}, {"image": " IMAGE", "text": "Caption"}),
        (["Image", "image", "text"], {}, {"image": "image", "text": "text"}),
        (["filepath", "title", "Split", "CATEGORY"], {}, dict(zip(("image", "text", "split", "category"),
                                                            ("filepath", "title", "Split", "CATEGORY"), strict=True))),
        (["image", "caption", "title"], {"text": "title"}, {"image": "image", "text": "title"}),
        (["image", "meta"], {"text": "meta.a.b"}, {"image": "image", "text": "meta.a.b"}),
    ],
)  # fmt: skip
def test_columns_that_are_taken(found: list[str], named: dict[str, str], chosen: dict[str, str]) -> None:
    assert choose_columns(Path("p.csv"), found, named) == chosen


@pytest.mark.parametrize(
    ("found", "named", "message"),
    [
        (
            ["image", "caption", "title"],
            {},
            r"has the columns caption and title; say with dataset\.columns\.text which",
        ),
        (["file_name", "filepath", "text"], {}, r"file_name and filepath; say with dataset\.columns\.image which"),
        (["image", "text", "text"], {}, "more than one column text"),
        (["image", "text"], {"category": "topic"}, r"has no column topic \(dataset\.columns\.category\)"),
        (["URL", "TEXT"], {}, r"no column image; .*URL, TEXT; .* img2dataset and take dataset\.source webdataset"),
    ],
)
def test_columns_that_cannot_be_meant(found: list[str], named: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_columns(Path("p.csv"), found, named)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_list_of_captions_gives_a_pair_each(tmp_path: Path, suffix: str) -> None:
    """In a table of text it is a list as JSON has it. An item that is no text loses itself only."""
    records = [{"image": "a.png", "text": ["One.", "Two."]}, {"image": "b.png", "text": ["Three."]}]
    path = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == ".csv":
        path.write_bytes(as_csv([{**record, "text": json.dumps(record["text"])} for record in records]))
    else:
        path.write_bytes(as_jsonl(records) if suffix == ".jsonl" else json.dumps(records).encode())
    rows = list(read_manifest(path, tmp_path))
    assert [(row.image, row.text) for row in rows] == [("a.png", "One."), ("a.png", "Two."), ("b.png", "Three.")]
    assert [row.label.partition(" text ")[2] for row in rows] == ["1", "2", ""]


def test_of_a_list_of_captions_a_bad_one_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(as_jsonl([{"image": "a.png", "text": ["One.", {}, None, 3]}]))
    rows = list(read_manifest(tmp_path / "p.jsonl", tmp_path))
    assert [(row.text, row.rejected and row.rejected[0]) for row in rows] == [
        ("One.", None), ("", "bad row"), ("", None), ("3", None),
    ]  # fmt: skip


def test_keys_that_begin_late_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("readers.tables.LOOKED_AT", 3)
    records = [*table(5), {"image": "x.png", "text": "x", "category": "late"}]
    records = [{k: v for k, v in record.items() if k != "category" or v == "late"} for record in records]
    (tmp_path / "p.jsonl").write_bytes(as_jsonl(records))
    assert [row.category for row in read_manifest(tmp_path / "p.jsonl", tmp_path)] == [*[None] * 5, "late"]


# Paths


@pytest.mark.parametrize(
    ("image", "kind", "remedy"),
    [
        ("photos\\a.jpg", "path of another system", "write paths with /"),
        ("C:\\photos\\a.jpg", "path of another system", "write paths with /"),
        ("D:/photos/a.jpg", "path of another system", "write paths with /"),
        ("https://example.com/a.jpg", "address", "img2dataset"),
        ("s3://bucket/a.jpg", "address", "img2dataset"),
    ],
)
def test_paths_of_another_system_and_addresses_are_told(tmp_path: Path, image: str, kind: str, remedy: str) -> None:
    _, why = placed(tmp_path, image)
    assert why and why[0] == kind and remedy in REMEDIES[kind]


def test_a_name_with_a_backslash_is_a_name_where_the_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "a\\b.png").write_bytes(b"")
    assert placed(tmp_path, "a\\b.png") == ("a\\b.png", None)


def test_a_folder_of_images_may_be_a_link_and_a_shard_may_not(tmp_path: Path) -> None:
    disk, root = tmp_path / "disk", tmp_path / "root"
    root.mkdir()
    draw(disk / "photos" / "a.png", 0)
    write_tar(disk / "b.tar", [("a.png", (disk / "photos" / "a.png").read_bytes())])
    (root / "photos").symlink_to(disk / "photos")
    (root / "b.tar").symlink_to(disk / "b.tar")
    (root / "a.png").symlink_to(disk / "photos" / "a.png")
    assert outside(root, "photos/a.png") is None
    for image in ("a.png", "b.tar/a.png@512+9"):
        assert (outside(root, image) or ("",))[0] == "link out of the root"


# Splits by names


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/0.tar", "test/0.tar", "val/0.tar"], ["train", "test", "val"]),
        (["train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"], ["train", "test"]),
        (["cc3m-train-0000.tar", "cc3m-val-0000.tar"], ["train", "test"]),
        (["train/0.tar", "train/1.tar"], None),
        (["train/0.tar", "more/1.tar"], None),
        (["trained/0.tar", "testing/1.tar"], None),
        (["test/train-0.tar", "train/1.tar"], None),
    ],
)
def test_splits_by_the_names_of_files(names: list[str], splits: list[str] | None) -> None:
    assert splits_by_name(names) == (dict(zip(names, splits, strict=True)) if splits else {})


# What to do about a rejected row


def kinds_in_the_code() -> set[str]:
    """The first text of every pair in the readers that may be a rejection's kind and detail, and of Rejections."""
    found = set()
    for path in [*(ROOT / "readers").glob("*.py"), ROOT / "images" / "files.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values: list[ast.expr] = []
            if isinstance(node, ast.keyword) and node.arg == "rejected" and isinstance(node.value, ast.Tuple):
                values = node.value.elts[:1]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Rejection", "RejectedRow"):
                values = node.args[:1]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UnreadableImage":
                values = [word.value for word in node.keywords if word.arg == "kind"]
            found |= {value.value for value in values if isinstance(value, ast.Constant) and value.value}
    return found


def test_every_kind_of_rejected_row_has_its_remedy_in_the_code_and_in_the_page() -> None:
    kinds = kinds_in_the_code()
    assert {"bad row", "empty text", "duplicate", "missing file", "ambiguous file"} <= kinds
    assert kinds <= {*REMEDIES}
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([^|]+?) \|$", page, re.MULTILINE))
    assert {kind: rows.get(kind) for kind in REMEDIES} == REMEDIES


def test_a_remedy_of_many_rows_is_printed(tmp_path: Path) -> None:
    records = [{**record, "image": "C:\\" + record["image"]} if n > 16 else record for n, record in enumerate(table())]
    printed = step_0(tmp_path / "work", *manifest(tmp_path / "p.csv", as_csv(records), table()))
    assert f"path of another system: {REMEDIES['path of another system']}\n" in printed
