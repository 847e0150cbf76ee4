"""Reader of Politics (Thomas and Kovashka, NeurIPS 2019): news photos with the articles that they illustrate.

Its metadata are pickles. A pickle is a program: it may name any function and call it. So they are read by an unpickler
that knows no functions at all, only built-in containers, strings and numbers.
"""

import collections
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.settings import Settings
from readers.published import Published, Row, given_root, inside, look_for

POLITICS = "https://people.cs.pitt.edu/~chris/politics/ (its code and dataset archives)"

HARMLESS = {
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, str, bytes, int, float, bool)},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
}
"""All that a pickle may name. Most of plain data name nothing: dicts, lists, strings and numbers are opcodes."""


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of built-in containers, strings and numbers; raises UnpicklingError at anything else."""

    def find_class(self, module: str, name: str) -> Any:
        found = HARMLESS.get(("builtins" if module == "__builtin__" else module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither a container, text nor a number")
        return found


def read_pickle(path: Path) -> Any:
    """What a pickle of plain data holds; raises UserError where it holds anything else, and runs nothing of it."""
    try:
        with path.open("rb") as file:
            return PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"refused to read {path}: {error or type(error).__name__}; fetch it from {POLITICS}") from None


def politics(settings: Settings) -> Published:
    """Politics as its authors publish it: `complete_db.pickle` or `db.pickle`, and `train_test_paths.pickle`.

    dataset.root holds them and the images, imgs/LEFT or RIGHT/ISSUE/SOURCE/NAME. Where both of the first are there,
    `complete_db.pickle` is read, which names the issues too. Raises UserError where one is missing.
    """
    root = given_root(settings)
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
            yield inside(root, row)


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
