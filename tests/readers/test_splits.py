"""Splits and deduplication as in Sec. 3.3 and 4.1 of the paper, config by config."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image
from published_formats import (
    write_coco,
    write_conceptual_captions,
    write_flickr30k,
    write_goodnews,
    write_politics,
)

import prepare_dataset
from pipeline.files import read_json, write_json
from pipeline.pairs import SPLITS
from pipeline.settings import RETIRED, checked_tree, load_settings
from pipeline.steps import PREPARE, stamp_path, what_changed
from readers.selection import assign_splits

CONFIGS: dict[str, Callable[[Path], None]] = {
    "politics": partial(write_politics, train=48, test=12),
    "goodnews": partial(write_goodnews, articles=60),
    "conceptual_captions": write_conceptual_captions,
    "coco": partial(write_coco, train=45, val=15),
    "coco-karpathy": partial(write_coco, train=45, val=15, karpathy=True),
    "flickr30k": partial(write_flickr30k, images=60),
    "flickr30k-karpathy": partial(write_flickr30k, images=60, karpathy=True),
}
"""By config, and what more there is: what writes a small dataset in its owners' format."""


def prepare(name: str, root: Path, work: Path, *words: str) -> list[dict[str, Any]]:
    """Step 0 with a shipped config: the pair table's rows."""
    config = str(ROOT / "configs" / f"{name.partition('-')[0]}.yaml")
    prepare_dataset.main(["--config", config, "--dataset.root", str(root), "--work", str(work), *words])
    return pq.read_table(work / "pairs.parquet").to_pylist()


def images_of_splits(rows: list[dict[str, Any]]) -> dict[str, int]:
    splits = {row["image_id"]: row["split"] for row in rows}
    assert all(splits[row["image_id"]] == row["split"] for row in rows), "a split parts an image"
    return dict(Counter(splits.values()))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_of_the_paper_split_80_10_10_by_image(name: str, tmp_path: Path) -> None:
    """Sec. 3.3: "We use a train-val-test split of 80-10-10"."""
    CONFIGS[name](tmp_path / "data")
    drawn = prepare(name, tmp_path / "data", tmp_path / "work")
    counts = images_of_splits(drawn)
    images = sum(counts.values())
    assert images >= 40
    assert counts == {"train": images - 2 * round(images / 10), "val": round(images / 10), "test": round(images / 10)}
    other = prepare(name, tmp_path / "data", tmp_path / "seed", "--seed", "1")
    assert images_of_splits(other) == counts and other != drawn
    if name != "flickr30k":  # it publishes no splits
        published = prepare(name, tmp_path / "data", tmp_path / "published", "--dataset.published_splits", "true")
        assert images_of_splits(published) != counts


def test_every_config_says_where_its_splits_come_from() -> None:
    taken = {path.stem: load_settings(path).dataset.published_splits for path in (ROOT / "configs").glob("*.yaml")}
    drawn = {"paper", "politics", "goodnews", "conceptual_captions", "coco", "flickr30k"}
    assert {name for name, published in taken.items() if not published} == drawn
    web_news = load_settings(ROOT / "configs" / "web_news.yaml").dataset
    assert (web_news.published_splits, web_news.val_share) == (True, 0.1)


BOILERPLATE = "We use cookies to give you the best experience. Please read our privacy policy before you go on. " * 6


def politics_with_boilerplate(root: Path) -> set[str]:
    """Politics in which three train and three test images come with the same text; returns these images."""
    write_politics(root, 30, 10)
    path = root / "complete_db.pickle"
    content = pickle.loads(path.read_bytes())
    images = set()
    for issues in content.values():
        for items in issues.values():
            for item in items:
                number = int(Path(item["local_path"]).stem)
                if number in (0, 1, 2, 30, 31, 32):
                    item["content_text"] = BOILERPLATE + f"Page {number}."
                    images.add(item["local_path"])
    path.write_bytes(pickle.dumps(content))
    return images


def test_boilerplate_over_train_and_test_is_removed(tmp_path: Path) -> None:
    """Sec. 4.1: "multiple images were paired with boilerplate text [...]. We removed duplicates using MinHash"."""
    images = politics_with_boilerplate(tmp_path / "data")
    assert len(images) == 6
    kept = prepare("politics", tmp_path / "data", tmp_path / "work")
    assert len(images & {row["image_path"] for row in kept}) == 1
    removed = [json.loads(line) for line in (tmp_path / "work" / "rejected.jsonl").read_text().splitlines()]
    assert {row["image"] for row in removed if row["kind"] == "near-duplicate"} < images
    assert sum(row["kind"] == "near-duplicate" for row in removed) == 5
    # 40 published pairs less 5
    assert Counter(row["split"] for row in kept) == {"train": 27, "val": 4, "test": 4}


def test_with_published_splits_test_rows_are_kept(tmp_path: Path) -> None:
    images = politics_with_boilerplate(tmp_path / "data")
    kept = prepare("politics", tmp_path / "data", tmp_path / "work", "--dataset.published_splits", "true")
    splits = Counter(row["split"] for row in kept if row["image_path"] in images)
    assert splits == {"test": 3}
    # As many images in val as in test
    assert Counter(row["split"] for row in kept) == {"train": 17, "val": 10, "test": 10}


@pytest.mark.parametrize(("train", "test", "val"), [(90, 10, 10), (30, 5, 5), (12, 40, 6), (30, 1, 2)])
def test_val_has_the_size_of_test_where_train_and_test_are_published(train: int, test: int, val: int) -> None:
    images = np.arange(train + test)
    published = np.repeat([SPLITS.index("train"), SPLITS.index("test")], [train, test])
    splits = assign_splits(images, [str(image) for image in images], published, 0, None, 0.3)
    assert np.bincount(splits).tolist() == [train - val, val, test]
    assert (splits[train:] == SPLITS.index("test")).all()


@pytest.mark.parametrize("published", ["true", "false"])
def test_articles_to_train_doc2vec_on_have_no_image_in_val_or_test(tmp_path: Path, published: str) -> None:
    write_goodnews(tmp_path / "data", 48)
    words = ("--doc2vec.train_on", "articles", "--dataset.published_splits", published)
    rows = prepare("goodnews", tmp_path / "data", tmp_path / "work", *words)
    held_out = {row["image_id"].partition("_")[0] for row in rows if row["split"] != "train"}
    content = json.loads((tmp_path / "data" / "captioning_dataset.json").read_text())
    expected = [article["article"].strip() for name, article in content.items() if name not in held_out]
    articles = pq.read_table(tmp_path / "work" / "articles.parquet")
    assert articles.column(0).to_pylist() == expected
    assert 0 < len(expected) < len(content)


def test_goodnews_trains_doc2vec_on_captions() -> None:
    assert load_settings(ROOT / "configs" / "goodnews.yaml").doc2vec.train_on == "texts"


def test_splits_of_a_manifest_are_kept_unless_new_ones_are_asked_for(tmp_path: Path) -> None:
    lines = ["image,text,split"]
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        split = "test" if number % 4 == 0 else "val" if number % 4 == 1 else "train"
        lines.append(f"{number}.png,text of the pair number {number} {number * 7},{split}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    words = ["--dataset.source", "manifest", "--dataset.manifest", str(tmp_path / "pairs.csv")]
    words += ["--dataset.root", str(tmp_path), "--work"]
    for more, expected in (
        ([], {"train": 20, "val": 10, "test": 10}),
        (["--dataset.published_splits", "false"], {"train": 32, "val": 4, "test": 4}),
    ):
        work = tmp_path / f"work{len(more)}"
        prepare_dataset.main([*words, str(work), *more])
        assert Counter(pq.read_table(work / "pairs.parquet")["split"].to_pylist()) == expected


def test_work_folders_of_earlier_versions_say_which_splits_they_have(tmp_path: Path) -> None:
    """`dataset.new_splits` of earlier versions is the inverse of `dataset.published_splits`."""
    words = ("--config", str(ROOT / "tests" / "tiny.yaml"), "--work", str(tmp_path))
    prepare_dataset.main([*words])
    settings = load_settings(ROOT / "tests" / "tiny.yaml", {"work": str(tmp_path)})
    path = stamp_path(PREPARE, settings)
    stamp = read_json(path)
    del stamp["settings"]["dataset.published_splits"]
    for drawn, reason in ((False, None), (True, "was made with dataset.published_splits False, and the settings now")):
        write_json(path, {**stamp, "settings": {**stamp["settings"], "dataset.new_splits": drawn}})
        assert str(what_changed(PREPARE, settings)).startswith(str(reason))
    tree = {**settings.model_dump(), "dataset": {**settings.dataset.model_dump(), "new_splits": True}}
    assert "dataset.new_splits" not in checked_tree(tree, "config.yaml", ignored=RETIRED)
