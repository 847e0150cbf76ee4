"""Reader of GoodNews (Biten et al., CVPR 2019): photos of the New York Times, their captions and their articles."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.published import (
    Published,
    Row,
    checked,
    files_below,
    given_root,
    json_members,
    look_for,
    read_published_json,
)

GOODNEWS = "https://github.com/furkanbiten/GoodNews (Get the data)"
CAPTIONS = ("captioning_dataset.json", "article_caption.json", "article+caption.json")
"""Names of one file: in the owners' code, and as it is downloaded."""


def goodnews(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """GoodNews: `captioning_dataset.json`, `img_splits.json`, and images/ or resized/ with ARTICLE_NUMBER.jpg.

    A row is an image with its caption, in the owners' split. Raises UserError where one of the files is missing.
    """
    root = given_root(dataset, GOODNEWS)
    captions = look_for(root, [place + name for place in ("", "data/") for name in CAPTIONS], "captions", GOODNEWS)
    splits = look_for(root, ("img_splits.json", "data/img_splits.json"), "splits of the images", GOODNEWS)
    images = look_for(root, ("images", "resized"), "folder of images", GOODNEWS).name
    return Published(
        root,
        lambda: read_goodnews(captions, splits, root, images),
        (captions, splits),
        lambda: files_below(root, images),
        lambda held_out: train_articles(captions, splits, held_out),
    )


def _split_of(path: Path) -> dict[str, str]:
    """The split of each image by its id, ARTICLE_NUMBER."""
    splits = read_published_json(path)
    if not isinstance(splits, dict) or not set(map(str, splits.values())) <= {"train", "val", "test"}:
        raise UserError(f"{path} does not say train, val or test of each image; fetch it from {GOODNEWS}")
    return {name.removesuffix(".jpg"): split for name, split in splits.items()}


def _articles(path: Path) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Id, captions by image number, and text of each article, one article at a time."""
    for article_id, article in json_members(path):
        try:
            yield article_id, dict(article["images"].items()), article.get("article")
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: article {article_id} has no images; fetch it from {GOODNEWS}") from None


def read_goodnews(captions: Path, splits: Path, root: Path, images: str) -> Iterator[Row]:
    """Rows of the articles, in their order. An image in no split is rejected: the owners left it out."""
    split_of = _split_of(splits)
    for article_id, found, _ in _articles(captions):
        for number, caption in found.items():
            image_id = f"{article_id}_{number}"
            label, image = f"{captions.name} {image_id}", f"{images}/{image_id}.jpg"
            if not isinstance(caption, str):
                yield Row(label, image, rejected=("bad row", "its caption is no text"))
            elif image_id not in split_of:
                yield Row(label, image, caption, rejected=("in no split", f"{image_id} is not in {splits.name}"))
            else:
                yield checked(root, Row(label, image, caption, image_id, split=split_of[image_id]))


def train_articles(captions: Path, splits: Path, held_out: Collection[str]) -> Iterator[str]:
    """Texts of the articles to train Doc2Vec on: those with published images, none of which is in `held_out`.

    `held_out` are the image_ids of val and test. Splits part images, not articles: an article may have images in train
    and in test.
    """
    split_of = _split_of(splits)
    for article_id, found, text in _articles(captions):
        of_article = [image for number in found if (image := f"{article_id}_{number}") in split_of]
        if of_article and not any(image in held_out for image in of_article) and isinstance(text, str) and text.strip():
            yield text.strip()
