"""Reader of Politics (Thomas and Kovashka, NeurIPS 2019): news photos with the articles that they illustrate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.plain_pickle import load_plain
from readers.published import Published, Row, checked, given_root, look_for

POLITICS = "https://people.cs.pitt.edu/~chris/politics/ (its code and dataset archives)"


def read_pickle(path: Path) -> Any:
    """What a pickle of plain data holds. Raises UserError where it holds anything else, and runs nothing of it."""
    try:
        return load_plain(path)
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"refused to read {path}: {error or type(error).__name__}; fetch it from {POLITICS}") from None


def politics(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """Politics as its authors publish it: `complete_db.pickle` or `db.pickle`, and `train_test_paths.pickle`.

    dataset.root holds them and the images, imgs/LEFT or RIGHT/ISSUE/SOURCE/NAME. Of the first two, `complete_db.pickle`
    is preferred: it names the issues too. Raises UserError where one is missing.
    """
    root = given_root(dataset, POLITICS)
    splits = look_for(root, ("train_test_paths.pickle",), "train and test paths of Politics", POLITICS)
    texts = look_for(root, ("complete_db.pickle", "db.pickle"), "texts of Politics", POLITICS)
    return Published(root, lambda: read_politics(root, texts, splits), (texts, splits), lambda: _images(splits))


def _images(splits: Path) -> Iterator[str]:
    yield from _split_of(splits)


def _split_of(path: Path) -> dict[str, str]:
    """The split of each image: lists of paths under `train` and `test`, in the NeurIPS release with `_imgs`."""
    lists = read_pickle(path)
    try:
        named = {split: lists[split] if split in lists else lists[f"{split}_imgs"] for split in ("test", "train")}
        for images in named.values():
            if not all(isinstance(image, str) for image in images):  # before they are hashed
                raise TypeError
        both = set(named["train"]) & set(named["test"])
        if both:
            raise UserError(f"{path} has {min(both)} in train and in test; fetch it from {POLITICS}")
        return {image: split for split, images in named.items() for image in images}
    except (TypeError, KeyError):
        raise UserError(f"{path} holds no lists of paths under train and test; fetch it from {POLITICS}") from None


def read_politics(root: Path, texts: Path, splits: Path) -> Iterator[Row]:
    """Rows of `complete_db.pickle` (politics -> issue -> items) or `db.pickle` (a list of path and text).

    The issue is the category. An image in neither train nor test is rejected: the authors left it out.
    """
    split_of = _split_of(splits)
    for label, issue, image, text in _items(texts):
        if not isinstance(image, str) or not isinstance(text, str):
            what = "local_path" if not isinstance(image, str) else "content_text"
            yield Row(label, rejected=("bad row", f"has no {what}"))
            continue
        row = Row(label, image.removeprefix("./"), text, category=issue, split=split_of.get(image))
        if row.split is None:
            yield Row(label, row.image, text, rejected=("in no split", f"{image} is not in {splits.name}"))
        else:
            yield checked(root, row)


def _items(path: Path) -> Iterator[tuple[str, str | None, Any, Any]]:
    """Label, issue, path of the image and text of each item. Raises UserError where the pickle is built otherwise."""
    content = read_pickle(path)
    try:
        if isinstance(content, dict):
            for side, issues in content.items():
                for issue, items in issues.items():
                    for number, item in enumerate(items):
                        label = f"{path.name} {side} {issue} {number}"
                        yield label, str(issue), item.get("local_path"), item.get("content_text")
        else:
            for number, (image, text) in enumerate(content):
                yield f"{path.name} {number}", None, image, text
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not built as Politics is ({error}); fetch it from {POLITICS}") from None
