"""Reader of a folder of one's own: pictures, and beside each its text in a file of the same name."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.delimited import names_an_image
from readers.published import Published, Row, checked, given_root, is_system_file
from readers.rejections import NO_TEXT
from readers.split_names import splits_by_name
from readers.text_files import RejectedRow, only, read_text


def folder(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """Pictures and texts in dataset.root, at any depth: `a/7.txt` is the text of `a/7.jpg`.

    Folders may be links. Where those in dataset.root are named as splits, they are the splits.
    Raises UserError where there is no picture.
    """
    root = given_root(dataset)
    if not any(names_an_image(name) for name in files_through_links(root)):
        raise UserError(f"dataset.root {root} holds no pictures: name another with --dataset.root (docs/data.md)")
    return Published(root, lambda: read_folder(root), (), lambda: files_through_links(root))


def read_folder(root: Path) -> Iterator[Row]:
    """Rows of the pictures, in the order of their paths, and of texts without a picture."""
    pictures: defaultdict[str, list[str]] = defaultdict(list)
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for name in files_through_links(root):
        stem = PurePosixPath(name).with_suffix("").as_posix()
        if names_an_image(name):
            pictures[stem].append(name)
        elif PurePosixPath(name).suffix.lower() == ".txt":
            texts[stem].append(name)
    tops = {stem: stem.partition("/")[0] if "/" in stem else "" for stem in pictures}
    split_of = splits_by_name(tops.values())
    for stem in sorted(pictures | texts):
        row = Row((pictures.get(stem) or texts[stem])[0], split=split_of.get(tops.get(stem, "")))
        try:
            image = only(pictures.get(stem, []), f"a picture {stem}")
            text = only(texts.get(stem, []), f"{stem}.txt", NO_TEXT)
            row = checked(root, replace(row, image=image), text)
            yield row if row.rejected else replace(row, text=read_text(root / text))
        except RejectedRow as error:
            yield replace(row, image=row.label if stem in pictures else "", rejected=error.args)


def files_through_links(root: Path) -> Iterator[str]:
    """Paths (relative to `root`) of all files below it, sorted, in folders that are links too, each folder once."""
    seen = {os.path.realpath(root)}
    for place, below, names in os.walk(root, followlinks=True):
        wanted = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(place, name))
            # A link to a folder around `root` would lead through all of the disk.
            if not is_system_file(name) and real not in seen and not os.path.realpath(root).startswith(f"{real}/"):
                seen.add(real)
                wanted.append(name)
        below[:] = wanted
        for name in sorted(names):
            if not is_system_file(name):
                yield os.path.relpath(os.path.join(place, name), root)
