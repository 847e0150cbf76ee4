"""Readers of COCO, Flickr30K and Flickr8K: photos with several captions each, and Karpathy's splits of them.

Formats as their owners publish them: COCO's captions and images at cocodataset.org, the Flickr collections at the
University of Illinois (and as they are passed on by others: `results.csv`, `captions.txt`), Karpathy and Fei-Fei's
splits (CVPR 2015) as `dataset_coco.json`, `dataset_flickr30k.json` and `dataset_flickr8k.json`.

The captions of an image are rows with one image_id. All of them are read, COCO's four to seven too.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.delimited import names_an_image, read_records
from readers.published import (
    LONGEST_LINE,
    TOO_LONG,
    Published,
    Row,
    checked,
    files_below,
    given_root,
    is_system_file,
    lines_of,
    look_for,
    read_published_json,
)
from readers.text_files import read_lines

KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/ (caption_datasets.zip)"
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""restval is the part of COCO's val2014 in neither val nor test. Since VSE++ it belongs to train."""


def karpathy_file(wanted: bool | None, root: Path, *names: str) -> Path | None:
    """The file of Karpathy's split, by dataset.karpathy_split: `wanted` None takes it where it exists.

    Raises UserError where it is wanted and missing.
    """
    places = [folder + name for name in names for folder in ("", "karpathy/", "annotations/", "caption_datasets/")]
    if wanted:
        return look_for(root, places, "file of Karpathy's split", KARPATHY)
    there = (root / place for place in places if (root / place).is_file())
    return next(there, None) if wanted is None else None


def read_karpathy(path: Path, root: Path, image_of: Callable[[dict[str, Any]], str]) -> Iterator[Row]:
    """Rows of one of Karpathy's files: `images`, each with `split`, and `sentences` with `raw` and `sentid`.

    `image_of` gives the path of an entry's image, relative to `root`. Raises UserError where the file is another.
    """
    content = read_published_json(path)
    number = 0
    try:
        for number, entry in enumerate(content["images"]):
            image, split = image_of(entry), entry["split"]
            if split not in KARPATHY_SPLITS:
                raise UserError(f"{path} has an unknown split, {split!r}, in image {number}")
            image_id = str(entry.get("cocoid", entry["filename"]))
            for sentence in entry["sentences"]:
                label = f"{path.name} sentence {sentence['sentid']}"
                yield checked(root, Row(label, image, sentence["raw"], image_id, split=KARPATHY_SPLITS[split]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is none of Karpathy's files (image {number}: {error!r}); see {KARPATHY}") from None


# COCO

COCO = "https://cocodataset.org/#download"
COCO_FOLDERS = ("train2017", "val2017", "train2014", "val2014")


def coco(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """COCO's images with their captions.

    With Karpathy's `dataset_coco.json`, splits and captions are his. Only the images are needed besides, of 2014 or of
    2017: they are the same under other names. Without it, `captions_train2017.json` is the train split and
    `captions_val2017.json` the test split: COCO publishes no captions of its test images.

    dataset.root holds these files, or annotations/ with them, and the folders of images, or images/ with them.
    Raises UserError where one of these is missing.
    """
    root = given_root(dataset, COCO)
    folders = {name: place for name in COCO_FOLDERS for place in (name, f"images/{name}") if (root / place).is_dir()}
    karpathy = karpathy_file(dataset.karpathy_split, root, "dataset_coco.json")
    if karpathy:
        if not folders:
            wanted = [*COCO_FOLDERS, *(f"images/{name}" for name in COCO_FOLDERS)]
            look_for(root, wanted, "folder of COCO's images", COCO)
        return Published(
            root,
            lambda: read_karpathy(karpathy, root, _coco_image(root, folders)),
            (karpathy,),
            lambda: files_below(root, *folders.values()),
        )
    parts = {}
    for name, split in (("train2017", "train"), ("val2017", "test")):
        file = f"captions_{name}.json"
        captions = look_for(root, (f"annotations/{file}", file), f"captions of {name}", COCO)
        look_for(root, (name, f"images/{name}"), f"images of {name}", COCO)
        parts[captions] = (folders[name], split)
    return Published(
        root, lambda: read_coco_captions(root, parts), tuple(parts), lambda: files_below(root, *folders.values())
    )


def _coco_image(root: Path, folders: dict[str, str]) -> Callable[[dict[str, Any]], str]:
    """Paths of the images of entries: `filepath` is the folder of 2014, `cocoid` the number in names of 2017."""
    in_val = set(os.listdir(root / folders["val2017"])) if "val2017" in folders else set()

    def image_of(entry: dict[str, Any]) -> str:
        folder, name = entry["filepath"], entry["filename"]
        if folder not in folders and {"train2017", "val2017"} & set(folders):
            name = f"{entry['cocoid']:012d}.jpg"
            folder = "val2017" if name in in_val or "train2017" not in folders else "train2017"
        return f"{folders.get(folder, folder)}/{name}"

    return image_of


def read_coco_captions(root: Path, parts: dict[Path, tuple[str, str]]) -> Iterator[Row]:
    """Rows of COCO's caption files. `parts` maps each to its folder of images and its split.

    A file holds `images` (`id`, `file_name`) and `annotations` (`id`, `image_id`, `caption`).
    """
    for path, (folder, split) in parts.items():
        content = read_published_json(path)
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for annotation in content["annotations"]:
                label = f"{path.name} annotation {annotation['id']}"
                number = annotation["image_id"]
                if number not in names:
                    yield Row(label, split=split, rejected=("bad row", f"there is no image {number} in {path.name}"))
                    continue
                image = f"{folder}/{names[number]}"
                yield checked(root, Row(label, image, annotation["caption"], str(number), split=split))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no file of COCO captions ({error!r}); fetch it from {COCO}") from None


# Flickr30K and Flickr8K

FLICKR = (
    "https://shannon.cs.illinois.edu/DenotationGraph/ (Flickr30K), "
    "https://hockenmaier.cs.illinois.edu/8k-pictures.html (Flickr8K)"
)
FLICKR_CAPTIONS = ("results.csv", "results_20130124.token", "Flickr8k.token.txt", "captions.txt")
FLICKR_IMAGES = ("flickr30k_images", "flickr30k-images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
FLICKR8K_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


def flickr30k(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """Flickr30K or Flickr8K: five captions an image.

    With Karpathy's `dataset_flickr30k.json` or `dataset_flickr8k.json`, splits and captions are his. Without it,
    captions are read from `results.csv`, `results_20130124.token`, `Flickr8k.token.txt` or `captions.txt`. Splits are
    then Flickr8K's lists beside that file, or are drawn.

    dataset.root holds these files, or a folder named as the archive with them, and the folder of images.
    Raises UserError where one of these is missing.
    """
    root = given_root(dataset, FLICKR)
    folder = _flickr_images(root)
    names = "dataset_flickr30k.json", "dataset_flickr8k.json"
    karpathy = karpathy_file(dataset.karpathy_split, root, *names)

    def images() -> Iterator[str]:
        return (name for name in files_below(root, folder) if name.endswith(".jpg"))

    if karpathy:

        def image_of(entry: dict[str, Any]) -> str:
            return f"{folder}{entry['filename']}"

        return Published(root, lambda: read_karpathy(karpathy, root, image_of), (karpathy,), images)
    places = [place + name for place in ("", "flickr30k_images/", "Flickr8k_text/") for name in FLICKR_CAPTIONS]
    captions = look_for(root, places, "captions", FLICKR)
    lists = [captions.parent / name for name in FLICKR8K_LISTS.values()]
    lists = lists if all(path.is_file() for path in lists) else []
    return Published(root, lambda: read_flickr(captions, lists, root, folder), (captions, *lists), images)


def _flickr_images(root: Path) -> str:
    """The folder of JPEG images, relative to `root` and with a slash at the end. "" is the root itself."""
    nested = [f"{outer}/{inner}" for outer in FLICKR_IMAGES for inner in FLICKR_IMAGES]
    for name in (*FLICKR_IMAGES, *nested, "."):
        if (root / name).is_dir():
            with os.scandir(root / name) as found:
                if any(entry.name.endswith(".jpg") and not is_system_file(entry.name) for entry in found):
                    return "" if name == "." else f"{name}/"
    wanted = [f"{name}/*.jpg" for name in FLICKR_IMAGES]
    look_for(root, wanted, "folder of Flickr's images", FLICKR)
    raise AssertionError("no file is called *.jpg")


def read_flickr(captions: Path, lists: list[Path], root: Path, folder: str) -> Iterator[Row]:
    """Rows of a file of captions. `lists` are Flickr8K's train, dev and test images, or empty.

    With lists, an image in none of them is rejected, as Flickr8K's owners do.
    """
    splits: dict[str, str] = {}
    for split, path in zip(FLICKR8K_LISTS, lists, strict=False):
        splits |= dict.fromkeys(read_lines(path), split)
    for number, image, text in _flickr_captions(captions):
        label = f"{captions.name} line {number}"
        if image is None:
            yield Row(label, rejected=("bad row", text))
            continue
        row = Row(label, folder + image, text, image, split=splits.get(image))
        if splits and row.split is None:
            yield Row(label, folder + image, text, image, rejected=("in no split", f"{image} is in none of the lists"))
        else:
            yield checked(root, row)


def _flickr_captions(path: Path) -> Iterator[tuple[int, str | None, str]]:
    """Line number, image and caption of each line. Image None: the line cannot be read, and the text says why.

    - `.token` and `.token.txt` have lines of image#number, a tab and the caption.
    - `results.csv` has a header and lines of image| number| caption. One line (2199200615.jpg, 4) has one bar only.
    - `captions.txt` has a header and lines of image,caption or image,number,caption.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if ".token" in path.name:
                yield from _read_token(file)
                return
            header = file.readline(LONGEST_LINE).strip()
            columns = [name.strip() for name in header.split("|" if "|" in header else ",")]
            if columns[0] not in ("image", "image_name") or columns[-1] not in ("caption", "comment"):
                raise UserError(f"{path} begins with {header!r:.60} and not with image_name| comment_number| comment")
            yield from _read_bars(file) if "|" in header else _read_commas(path, file, len(columns))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again from {FLICKR}") from None


def _read_token(file: TextIO) -> Iterator[tuple[int, str | None, str]]:
    for number, line in lines_of(file):
        key, tab, text = (line or "").rstrip("\r\n").partition("\t")
        image, mark, _ = key.rpartition("#")
        if line is None:
            yield number, None, TOO_LONG
        elif tab and mark:
            yield number, image, text
        elif line.strip():
            yield number, None, f"is not image#number, tab, caption: {line.strip():.60}"


def _read_bars(file: TextIO) -> Iterator[tuple[int, str | None, str]]:
    for number, line in lines_of(file):
        found = re.match(r"([^|]+)\|\s*\d+\s*(?:\||\s)\s*(.*)", (line or "").strip())
        if line is None:
            yield number + 1, None, TOO_LONG
        elif found:
            yield number + 1, found[1].strip(), found[2]
        elif line.strip():
            yield number + 1, None, f"is not image| number| caption: {line.strip():.60}"


def _read_commas(path: Path, file: TextIO, columns: int) -> Iterator[tuple[int, str | None, str]]:
    """A caption whose commas are not quoted has more fields than the header: they are joined again."""

    def is_row(fields: list[str]) -> bool:
        return len(fields) >= columns and names_an_image(fields[0])

    for number, fields in read_records(path, file, ",", is_row, first_line=2, strict=False):
        if isinstance(fields, str):
            yield number, None, fields
        elif len(fields) >= columns:
            yield number, fields[0], ",".join(fields[columns - 1 :])
        elif fields:
            yield number, None, f"has {len(fields)} fields and not {columns}"
