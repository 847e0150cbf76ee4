"""Step 0 from its command line: every source, every reason to leave a row out, and the splits."""

import io
import json
import os
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import one_line_error, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import prepare_dataset
from pipeline.errors import UserError
from pipeline.pairs import SCHEMA, SPLITS, image_root
from readers.published import Row
from readers.rejections import REMEDIES
from readers.selection import assign_splits, conflicting_images, read_table

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"
xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
<dc:title>{title}</dc:title><dc:description></dc:description><dc:subject><rdf:Bag><rdf:li>{keyword}</rdf:li></rdf:Bag>
</dc:subject></cc:Work></rdf:RDF></metadata></svg>"""


def prepare(work: Path, *words: str | Path) -> str:
    """Run step 0 in this process and return what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        prepare_dataset.main(["--work", str(work), *map(str, words)])
    return printed.getvalue()


def rows(work: Path) -> list[dict[str, Any]]:
    return pq.read_table(work / "pairs.parquet").to_pylist()


def rejected(work: Path) -> dict[str, str]:
    lines = (work / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["row"]: record["reason"] for record in map(json.loads, lines)}


def draw_image(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (5, 4), colour % 256).save(path)


def manifest(folder: Path, records: list[dict[str, Any]], draw: bool = True) -> list[str]:
    """A manifest, its images, and the words of the command line that name it."""
    folder.mkdir(exist_ok=True)
    for record in records if draw else ():
        draw_image(folder / record["image"])
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return ["--dataset.source", "manifest", "--dataset.manifest", str(path)]


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    """Records whose texts share no word."""
    return [{"image": f"{n}.png", "text": f"one{n} two{n} three{n} four{n}", **more} for n in range(count)]


# The command line, as a user has it


def test_help() -> None:
    done = run_script("prepare_dataset.py", "--help")
    assert "Step 0" in done.stdout
    assert "--dataset.near_duplicate_threshold" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset.mainfest", "pairs.csv"], "no setting is called dataset.mainfest; did you mean dataset.manifest?"),
        (
            ["--dataset.source", "manifest", "--dataset.manifest", "pairs.csv"],
            "dataset.manifest pairs.csv is not there",
        ),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    done = run_script("prepare_dataset.py", "--work", tmp_path / "work", *words, ok=False)
    assert one_line_error(done) == f"prepare_dataset.py: {message}"
    assert not (tmp_path / "work").exists()


def test_one_unreadable_image_among_good_ones(tmp_path: Path) -> None:
    """The whole of it, in a process of its own: what is printed, written, rejected, and said the second time."""
    words = manifest(tmp_path / "data", numbered(20, category="c"))
    image = tmp_path / "data" / "7.png"
    image.write_bytes(image.read_bytes()[:-20])
    work = tmp_path / "work"
    done = run_script("prepare_dataset.py", "--work", work, *words)
    lines = done.stdout.splitlines()
    assert lines == [
        "pairs.jsonl: image, text, category",
        "published rows                        20",
        "  unreadable image                    -1",
        "kept rows                             19",
        "  train                               15",
        "  val                                  2",
        "  test                                 2",
        "images of these                       19",
        f"wrote {work}/pairs.parquet",
        f"wrote {work}/rejected.jsonl",
        lines[-1],
    ]
    assert lines[-1].startswith("next: python train_doc2vec.py ")
    assert not done.stderr
    assert pq.read_schema(work / "pairs.parquet").remove_metadata() == SCHEMA
    assert image_root(work) == tmp_path / "data"
    kept = rows(work)
    assert [row["image_path"] for row in kept] == [f"{n}.png" for n in range(20) if n != 7]
    assert kept[0] | {"split": "any"} == {
        "image_id": "0.png",
        "image_path": "0.png",
        "text": "one0 two0 three0 four0",
        "category": "c",
        "split": "any",
    }
    (line,) = (work / "rejected.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.pop("reason").startswith("unreadable image: ")
    assert record == {
        "row": "line 8",
        "image": "7.png",
        "text": "one7 two7 three7 four7",
        "kind": "unreadable image",
        "remedy": REMEDIES["unreadable image"],
    }
    figures = json.loads((work / "prepare_dataset.json").read_text())["figures"]
    assert figures == {
        "published": 20,
        "rejected": {"unreadable image": 1},
        "kept": 19,
        "images": 19,
        "splits": {"train": 15, "val": 2, "test": 2},
    }
    again = run_script("prepare_dataset.py", "--work", work, *words)
    told = [f"up to date {work}/pairs.parquet", f"up to date {work}/rejected.jsonl", lines[-1]]
    assert again.stdout.splitlines() == told


# Sources, end to end


def test_openclipart(tmp_path: Path) -> None:
    root = tmp_path / "usr" / "share" / "openclipart"
    for number in range(20):
        name = f"{'food' if number % 2 else 'animals'}/drawing{number}"
        draw_image(root / "png" / f"{name}.png", number)
        (root / "svg" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "svg" / f"{name}.svg").write_text(SVG.format(title=f"Title{number}", keyword=f"word{number}"))
    (root / "png" / "animals" / "same.png").symlink_to("../food/drawing1.png")
    (root / "svg" / "animals" / "same.svg").symlink_to("../food/drawing1.svg")
    (root / "svg" / "food" / "drawing3.svg").write_text(SVG.format(title="HASH(0x850c64c)", keyword="hash"))
    prepare(tmp_path / "work", "--dataset.root", tmp_path)
    kept = rows(tmp_path / "work")
    assert len(kept) == 19
    assert image_root(tmp_path / "work") == root
    assert kept[1]["image_path"] == "png/animals/drawing10.png"
    assert {row["image_path"]: row["text"] for row in kept}["png/food/drawing5.png"] == "Title5. word5."
    assert Counter(row["category"] for row in kept) == {"animals": 11, "food": 8}
    assert rejected(tmp_path / "work") == {
        "png/food/drawing1.png": "duplicate of png/animals/same.png",
        "png/food/drawing3.png": "empty text",
    }


def test_wikipedia(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name, count in (("trainset", 30), ("testset", 5)):
        lines = []
        for number in range(count):
            draw_image(root / "images" / "art" / f"{name}{number}.jpg")
            (root / "texts").mkdir(exist_ok=True)
            text = "<wiki><text>The same article for all.</text></wiki>"
            (root / "texts" / f"{name}-{number}.5.xml").write_text(text)
            lines.append(f"{name}-{number}.5\t{name}{number}\t1\n")
        (root / f"{name}_txt_img_cat.list").write_text("".join(lines))
    (root / "categories.list").write_text("art\n")
    words = ["--dataset.source", "wikipedia", "--dataset.root", root]
    prepare(tmp_path / "work", *words)
    kept = rows(tmp_path / "work")
    assert Counter(row["split"] for row in kept) == {"train": 25, "val": 5, "test": 5}  # val has the size of test
    assert all((row["split"] == "test") == ("testset" in row["image_path"]) for row in kept)
    assert kept[0]["text"] == "The same article for all."
    # asked for, near-duplicates go from train where they repeat the test split, which stays
    with pytest.raises(UserError, match=r"no rows for train and val: .* 5 are left, rejected were: 30 near-duplicate"):
        prepare(tmp_path / "work", *words, "--dataset.near_duplicates", "true")
    assert rejected(tmp_path / "work")["trainset_txt_img_cat.list line 1"] == (
        "near-duplicate of testset_txt_img_cat.list line 1"
    )


def test_synthetic(tmp_path: Path) -> None:
    words = ["--dataset.source", "synthetic", "--dataset.synthetic.pairs", "50"]
    prepare(tmp_path / "work", *words)
    kept = rows(tmp_path / "work")
    assert Counter(row["split"] for row in kept) == {"train": 40, "val": 5, "test": 5}
    assert all((image_root(tmp_path / "work") / row["image_path"]).is_file() for row in kept)
    assert prepare(tmp_path / "work", *words).startswith("up to date")
    prepare(tmp_path / "other", *words, "--seed", "1")
    assert rows(tmp_path / "other")[0]["text"] != kept[0]["text"]


# What is left out


def test_every_reason(tmp_path: Path) -> None:
    caption = "a black cat sat on the mat in the sun and slept there for hours"
    records = [
        *numbered(10),
        {"image": "x.png", "text": caption},
        {"image": "y.png", "text": caption.upper() + "!"},
        {"image": "x.png", "text": caption + "."},
        {"image": "x.png", "text": caption},
        {"image": "gone.png", "text": "something else entirely"},
        {"image": "gone.png", "text": "a second caption of it"},
        {"image": "0.png", "text": " \n"},
        {"image": "/0.png", "text": "absolute"},
        {"image": "a\0b.png", "text": "nul"},
        {"image": "z.png", "text": "bytes \udcff"},
        {"image": "z.png", "text": "another picture", "image_id": "1.png"},
        {"image": "2.png", "text": "the same picture", "image_id": "zwei"},
    ]
    words = manifest(tmp_path / "data", records, draw=False)
    for name in [*(f"{n}" for n in range(10)), "x", "y", "z"]:
        draw_image(tmp_path / "data" / f"{name}.png")
    printed = prepare(tmp_path / "work", *words)
    assert rejected(tmp_path / "work") == {
        "line 12": "near-duplicate of line 11",
        "line 14": "duplicate of line 11",
        "line 15": f"missing file: {tmp_path}/data/gone.png",
        "line 16": f"missing file: {tmp_path}/data/gone.png",
        "line 17": "empty text",
        "line 18": f"outside the root: /0.png is an absolute path that does not lie in {tmp_path}/data",
        "line 19": "unreadable image: embedded null byte",
        "line 20": "bad row: is not UTF-8",
        "line 21": "image_id of another image: line 2 says that 1.png is 1.png",
        "line 22": "image of another image_id: line 3 says that 2.png is 2.png",
    }
    assert "  missing file                        -2\n" in printed
    assert len(rows(tmp_path / "work")) == 12
    prepare(tmp_path / "work", *words, "--dataset.near_duplicates", "false")
    assert "line 12" not in rejected(tmp_path / "work")
    assert len(rows(tmp_path / "work")) == 13


def test_near_duplicates_are_kept_where_splits_are_published(tmp_path: Path) -> None:
    records = [
        {"image": f"{n}.png", "text": "one and the same text", "split": split}
        for n, split in enumerate(["train", "train", "dev", "test", "test", "dev"])
    ]
    records.append({"image": "3.png", "text": "one and the same text", "split": "test"})
    records.append({"image": "0.png", "text": "one and the same text", "split": "train"})
    words = manifest(tmp_path / "data", records)
    prepare(tmp_path / "work", *words)
    assert [row["split"] for row in rows(tmp_path / "work")] == "train train val test test val test".split()
    assert rejected(tmp_path / "work") == {"line 8": "duplicate of line 1"}


def test_a_train_row_whose_image_is_tested_on_is_rejected(tmp_path: Path) -> None:
    splits = ["train", "train", "val", "test", "val", "test"]
    records = [record | {"split": split} for record, split in zip(numbered(6), splits, strict=True)]
    records.append({"image": "3.png", "text": "another text", "split": "train"})
    records.append({"image": "3.png", "text": "yet another text", "split": "test"})
    words = manifest(tmp_path / "data", records)
    prepare(tmp_path / "work", *words)
    assert rejected(tmp_path / "work") == {"line 7": "image of another split: 3.png is in test too (line 4)"}
    records.append({"image": "3.png", "text": "a third text", "split": "val"})
    with pytest.raises(UserError, match=r"3\.png is published in val \(line 9\) and in test \(line 4\)"):
        prepare(tmp_path / "work", *manifest(tmp_path / "data", records))


def test_an_empty_dataset(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("image,text\n")
    words = ["--dataset.source", "manifest", "--dataset.manifest", tmp_path / "pairs.csv"]
    done = run_script("prepare_dataset.py", "--work", tmp_path / "work", *words, ok=False)
    assert "the published files hold no rows" in one_line_error(done)


@pytest.mark.parametrize(
    ("records", "draw", "message"),
    [
        (
            numbered(3),
            False,
            r"no rows for train and val and test: of 3 published rows 0 are left, .*: 3 missing file \(",
        ),
        (numbered(4), True, r"no rows for train: of 4 published rows 4 are left, rejected were: none"),
        (
            [*numbered(5, split="train"), *({"image": "one.png", "text": f"text{n}", "split": "test"} for n in "ab")],
            True,
            r"fewer than 2 images for test: of 7 published rows 7 are left",
        ),
        (numbered(9, split="train"), True, "no rows for test: of 9"),
    ],
)
def test_an_empty_split_is_a_mistake(tmp_path: Path, records: list, draw: bool, message: str) -> None:
    words = manifest(tmp_path / "data", records, draw)
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / "work", *words)
    assert ("rejected.jsonl names each" in str(caught.value)) == ("rejected were: none" not in str(caught.value))
    assert not (tmp_path / "work" / "pairs.parquet").exists()
    assert not (tmp_path / "work" / "prepare_dataset.json").exists()


def test_only_the_header_of_images_is_read_if_asked(tmp_path: Path) -> None:
    words = manifest(tmp_path / "data", numbered(10))
    image = tmp_path / "data" / "7.png"
    image.write_bytes(image.read_bytes()[:-20])
    prepare(tmp_path / "work", *words, "--dataset.check_images", "header")
    assert not rejected(tmp_path / "work")
    with pytest.raises(UserError, match="10 unreadable image"):
        prepare(tmp_path / "work", *words, "--dataset.max_pixels", "19", "--dataset.check_images", "header")


# Again


def test_same_command_same_bytes(tmp_path: Path) -> None:
    words = manifest(tmp_path / "data", numbered(30) + numbered(3))
    for work in ("one", "two"):
        prepare(tmp_path / work, *words)
    for name in ("pairs.parquet", "rejected.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_changes_are_noticed(tmp_path: Path) -> None:
    records = numbered(12)
    words = manifest(tmp_path / "data", records)
    prepare(tmp_path / "work", *words)
    assert prepare(tmp_path / "work", *words).startswith("up to date")
    os.utime(tmp_path / "data" / "3.png", ns=(1, 1))
    assert prepare(tmp_path / "work", *words).startswith("up to date")  # as after a copy
    with (tmp_path / "data" / "3.png").open("ab") as file:
        file.write(b"more")
    assert "was made from other published files (images and texts): making it anew" in prepare(
        tmp_path / "work", *words
    )
    manifest(tmp_path / "data", records[:11])
    assert f"wrote {tmp_path}/work/pairs.parquet" in prepare(tmp_path / "work", *words)
    assert len(rows(tmp_path / "work")) == 11
    assert "with seed 0, and the settings now say 1" in prepare(tmp_path / "work", *words, "--seed", "1")
    assert "with dataset.val_share" in prepare(tmp_path / "work", *words, "--dataset.val_share", "0.3", "--seed", "1")


# Splits


def numbers(image_ids: list[str]) -> tuple[np.ndarray, list[str]]:
    distinct = list(dict.fromkeys(image_ids))
    return np.array([distinct.index(image) for image in image_ids], np.int64), distinct


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(max_size=3), max_size=60),
    st.integers(0, 5),
    st.sampled_from([0.05, 0.1, 0.3]),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_splits_never_part_an_image(image_ids: list[str], seed: int, val_share: float, test_share: float) -> None:
    images, distinct = numbers(image_ids)
    splits = assign_splits(images, distinct, None, seed, val_share, test_share)
    of_image = dict(zip(image_ids, splits.tolist(), strict=True))
    assert [of_image[image] for image in image_ids] == splits.tolist()
    if len(distinct) >= 5:
        count = Counter(of_image.values())
        assert count[1] == max(2, round(val_share * len(distinct)))
        assert count[2] == max(2, round(test_share * len(distinct)))
        assert count[0] == len(distinct) - count[1] - count[2] > 0
    order = np.random.default_rng(seed).permutation(len(image_ids))
    shuffled, again = numbers([image_ids[row] for row in order])
    assert assign_splits(shuffled, again, None, seed, val_share, test_share).tolist() == splits[order].tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=60))
def test_published_splits_are_kept_and_val_comes_from_train(rows: list[tuple[int, str]]) -> None:
    published_of = {image: number % 3 for number, image in enumerate({image for image, _ in rows})}
    images, distinct = numbers([str(image) for image, _ in rows])
    published = np.array([published_of[image] for image, _ in rows])
    assert assign_splits(images, distinct, published, 0, 0.1, 0.1).tolist() == published.tolist() or (
        1 not in published
    )
    without_val = np.where(published == 1, 0, published)
    splits = assign_splits(images, distinct, without_val, 0, 0.1, 0.1)
    assert ((splits == 2) == (without_val == 2)).all()
    train = {image for (image, _), split in zip(rows, without_val, strict=True) if split == 0}
    val = {image for (image, _), split in zip(rows, splits, strict=True) if split == 1}
    assert val <= train
    assert len(val) == min(max(2, round(0.1 * len(train))), len(train))
    assert all(split == 1 for (image, _), split in zip(rows, splits, strict=True) if image in val)


def test_splits_differ_between_seeds_and_hardly_when_rows_are_added() -> None:
    images, distinct = np.arange(1000), [str(n) for n in range(1100)]
    first = assign_splits(images, distinct, None, 0, 0.1, 0.1)
    assert Counter(first.tolist()) == {0: 800, 1: 100, 2: 100}
    assert (assign_splits(images, distinct, None, 1, 0.1, 0.1) != first).sum() > 200
    more = assign_splits(np.arange(1100), distinct, None, 0, 0.1, 0.1)
    assert (more[:1000] != first).sum() < 40


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.sampled_from(SPLITS)), max_size=25))
def test_after_conflicts_an_image_is_one_file_in_one_split(published: list[tuple[int, int, str]]) -> None:
    table, none = read_table(
        (
            Row(f"line {n}", f"{path}.png", "x", f"id{image}", split=split)
            for n, (image, path, split) in enumerate(published)
        ),
        chunk=4,
    )
    assert not none
    try:
        gone = conflicting_images(table, {})
    except UserError as error:
        assert "in val" in str(error) and "in test" in str(error)
        return
    kept = [row for number, row in enumerate(published) if number not in gone]
    paths, splits = {}, {}
    for image, path, split in kept:
        assert paths.setdefault(image, path) == path
        assert splits.setdefault(image, split) == split
    assert len(set(paths.values())) == len(paths)
    assert all(published[number][2] == "train" or "another image" in why.kind for number, why in gone.items())
