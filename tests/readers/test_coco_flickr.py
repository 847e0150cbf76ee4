"""The readers of COCO and of the Flickr collections, on small files in their exact formats."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import TINY, run_script
from published_formats import draw, sentence, write_coco, write_flickr30k

from pipeline.errors import UserError
from pipeline.registry import READERS
from pipeline.schema import Dataset, Settings
from pipeline.settings import mistakes
from readers.published import Published


def published(**dataset: Any) -> Published:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in dataset.items()}
    return READERS.load(values["source"])(Dataset(**values), Path("no"), 0)


# COCO


def test_coco_2017(tmp_path: Path) -> None:
    write_coco(tmp_path, train=6, val=3)
    source = published(source="coco", root=tmp_path)
    rows = list(source.rows())
    assert len(rows) == sum(4 + number % 4 for number in range(9))
    assert {(row.image_id, row.image) for row in rows if row.split == "test"} == {
        (str(9 + 16 * number), f"val2017/{9 + 16 * number:012d}.jpg") for number in (6, 7, 8)
    }
    assert Counter(row.split for row in rows) == {"train": 4 + 5 + 6 + 7 + 4 + 5, "test": 6 + 7 + 4}
    assert rows[0].label == "captions_train2017.json annotation 37"
    assert (rows[0].text, rows[3].text) == (sentence(0), sentence(9000) + "\n")
    assert all((tmp_path / row.image).is_file() and not row.rejected for row in rows)
    before = source.fingerprints()
    draw(tmp_path / "val2017" / "000000000105.jpg", 99)
    assert source.fingerprints() != before


@pytest.mark.parametrize("year", [2014, 2017])
def test_karpathys_split_of_coco(tmp_path: Path, year: int) -> None:
    write_coco(tmp_path, train=10, val=6, karpathy=True)
    entries = json.loads((tmp_path / "dataset_coco.json").read_text())["images"]
    if year == 2014:
        for entry in entries:
            old = next(tmp_path.glob(f"*2017/{entry['cocoid']:012d}.jpg"))
            (tmp_path / "images" / entry["filepath"]).mkdir(parents=True, exist_ok=True)
            old.rename(tmp_path / "images" / entry["filepath"] / entry["filename"])
        for name in ("train2017", "val2017", "annotations"):
            for path in (tmp_path / name).iterdir():
                path.unlink()
            (tmp_path / name).rmdir()
    rows = list(published(source="coco", root=tmp_path).rows())
    assert all((tmp_path / row.image).is_file() and not row.rejected for row in rows)
    wanted = {str(entry["cocoid"]): entry["split"].replace("restval", "train") for entry in entries}
    assert {row.image_id: row.split for row in rows} == wanted
    assert set(wanted.values()) == {"train", "val", "test"}
    assert [row.text for row in rows] == [each["raw"] for entry in entries for each in entry["sentences"]]
    assert rows[0].label == "dataset_coco.json sentence 37"


def test_karpathys_split_can_be_left(tmp_path: Path) -> None:
    write_coco(tmp_path, karpathy=True)
    splits = [
        Counter(row.split for row in published(source="coco", root=tmp_path, karpathy_split=wanted).rows())
        for wanted in (None, True, False)
    ]
    assert splits[0] == splits[1] != splits[2]
    assert set(splits[2]) == {"train", "test"}
    (tmp_path / "dataset_coco.json").unlink()
    with pytest.raises(UserError, match=r"no file of Karpathy's split: looked for dataset_coco\.json, .*caption_data"):
        published(source="coco", root=tmp_path, karpathy_split=True)


@pytest.mark.parametrize("gone", ["annotations/captions_val2017.json", "val2017"])
def test_coco_names_what_is_missing(tmp_path: Path, gone: str) -> None:
    write_coco(tmp_path, train=2, val=1)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as caught:
        published(source="coco", root=tmp_path)
    message = str(caught.value)
    assert gone in message and "found annotations, elsewhere, train2017" in message and "cocodataset.org" in message


def test_karpathys_file_without_images(tmp_path: Path) -> None:
    (tmp_path / "dataset_coco.json").write_text("{}")
    with pytest.raises(UserError, match="no folder of COCO's images: looked for train2017, .* found dataset_coco.json"):
        published(source="coco", root=tmp_path)


def test_broken_coco_files(tmp_path: Path) -> None:
    write_coco(tmp_path, train=2, val=1, karpathy=True)
    path = tmp_path / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["image_id"] = 4
    content["images"][1]["file_name"] = "../val2017/000000000041.jpg"
    path.write_text(json.dumps(content))
    rows = list(published(source="coco", root=tmp_path, karpathy_split=False).rows())
    assert rows[0].rejected == ("bad row", "there is no image 4 in captions_train2017.json")
    assert [row.rejected and row.rejected[0] for row in rows[1:9]] == [None] * 3 + ["outside the root"] * 5
    for broken, message in (
        ("{", "cannot read .*captions_train2017.json: Expecting"),
        ('{"images": [], "annotations": [{"id": 1}]}', "is no file of COCO captions"),
        ("[]", "is no file of COCO captions"),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=message):
            list(published(source="coco", root=tmp_path, karpathy_split=False).rows())
    for broken, message in (
        ('{"images": [{"filepath": "x", "filename": "y", "split": "held", "cocoid": 1}]}', "unknown split, 'held'"),
        ('{"images": [{"filepath": "x", "filename": "y", "cocoid": 1}]}', "none of Karpathy's files"),
        ('{"annotations": []}', "none of Karpathy's files"),
    ):
        (tmp_path / "dataset_coco.json").write_text(broken)
        with pytest.raises(UserError, match=message):
            list(published(source="coco", root=tmp_path).rows())


def test_wrong_settings() -> None:
    (message,) = mistakes(Settings(dataset=Dataset(source="coco")))
    assert message.startswith("dataset.source coco needs dataset.root, the folder with annotations/")
    assert mistakes(Settings(dataset=Dataset(source="openclipart", karpathy_split=True)))
    assert not mistakes(Settings(dataset=Dataset(source="flickr30k", root="x", karpathy_split=True)))


# Flickr30K and Flickr8K


@pytest.mark.parametrize(
    "captions", ["results.csv", "results_20130124.token", "Flickr8k.token.txt", "captions.txt", "karpathy"]
)
def test_flickr_captions_in_every_file(tmp_path: Path, captions: str) -> None:
    karpathy = captions == "karpathy"
    write_flickr30k(tmp_path, 8, "captions.txt" if karpathy else captions, karpathy)
    if karpathy:
        (tmp_path / "captions.txt").unlink()
    rows = list(published(source="flickr30k", root=tmp_path).rows())
    assert len(rows) == 40 and not any(row.rejected for row in rows)
    assert [row.text for row in rows[::5]] == [sentence(number) for number in range(8)]
    assert rows[1].text == sentence(3000).replace(" ", ", ", 1).replace(".", ' , " says so " .')
    assert rows[9].text == sentence(12001)  # the line without its second bar
    assert [(row.image, row.image_id) for row in rows[5:7]] == [
        ("flickr30k_images/1000092802.jpg", "1000092802.jpg")
    ] * 2
    assert {row.split for row in rows} == ({"train", "val", "test"} if karpathy else {None})


def test_flickr8k_with_its_own_splits(tmp_path: Path) -> None:
    write_flickr30k(tmp_path, 4, "Flickr8k.token.txt")
    (tmp_path / "flickr30k_images").rename(tmp_path / "Flicker8k_Dataset")
    (tmp_path / "Flickr8k_text").mkdir()
    path = tmp_path / "Flickr8k_text" / "Flickr8k.token.txt"
    (tmp_path / "Flickr8k.token.txt").rename(path)
    path.write_text(path.read_text() + "2258277193_586949ec62.jpg.1#0\tPeople on atvs .\nno tab\n")
    names = [f"{1000092795 + 7 * number}.jpg" for number in range(4)]
    for name, listed in (("train", names[:1]), ("dev", names[1:2]), ("test", names[2:3])):
        (path.parent / f"Flickr_8k.{name}Images.txt").write_text("\n".join(listed) + "\n")
    rows = list(published(source="flickr30k", root=tmp_path).rows())
    assert [row.split for row in rows[:20:5]] == ["train", "val", "test", None]
    assert [row.rejected and row.rejected[0] for row in rows[14:]] == [None] + ["in no split"] * 6 + ["bad row"]
    assert rows[0].image == "Flicker8k_Dataset/1000092795.jpg"
    (path.parent / "Flickr_8k.devImages.txt").write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(UserError, match=r"cannot read .*Flickr_8k\.devImages\.txt"):
        list(published(source="flickr30k", root=tmp_path).rows())


def test_other_shapes_of_captions_txt(tmp_path: Path) -> None:
    write_flickr30k(tmp_path, 1, "captions.txt")
    (tmp_path / "captions.txt").write_text(
        "image_name,comment_number,comment\n1000092795.jpg,0, One , two .\n1000092795.jpg\n1000092795.jpg,2,Three\n"
    )
    rows = list(published(source="flickr30k", root=tmp_path).rows())
    assert [row.text for row in rows if not row.rejected] == [" One , two .", "Three"]
    assert [row.label for row in rows if row.rejected] == ["captions.txt line 3"]
    (tmp_path / "captions.txt").write_text("file;text\n")
    with pytest.raises(UserError, match="begins with 'file;text' and not with image_name"):
        list(published(source="flickr30k", root=tmp_path).rows())


def test_flickr_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of Flickr's images: .* found nothing\. .*illinois\.edu"):
        published(source="flickr30k", root=tmp_path)
    draw(tmp_path / "flickr30k_images" / "flickr30k_images" / "1.jpg", 1)
    with pytest.raises(UserError, match=r"no captions: looked for results\.csv, .*found flickr30k_images\. "):
        published(source="flickr30k", root=tmp_path)
    (tmp_path / "flickr30k_images" / "results.csv").write_text(
        "image_name| comment_number| comment\n1.jpg| 0| A dog .\n1.jpg| none\n"
    )
    rows = list(published(source="flickr30k", root=tmp_path).rows())
    assert [row.image for row in rows] == ["flickr30k_images/flickr30k_images/1.jpg", ""]
    assert rows[1].rejected == ("bad row", "is not image| number| caption: 1.jpg| none")


@pytest.mark.slow
def test_the_made_up_sample_is_read_as_coco(tmp_path: Path) -> None:
    run_script("benchmarks/coco_sample.py", "--out", tmp_path / "sample", "--train", "12", "--val", "3")
    words = [*TINY, "--dataset.source", "coco", "--dataset.root", tmp_path / "sample", "--work", tmp_path / "work"]
    run_script("prepare_dataset.py", *words)
    table = pq.read_table(tmp_path / "work" / "pairs.parquet").to_pylist()
    texts_of = Counter(row["image_id"] for row in table)
    assert len(texts_of) == 15
    assert set(texts_of.values()) == {5}
    assert len({row["image_id"] for row in table if row["split"] == "test"}) == 3
    assert len({row["text"] for row in table}) == 75
