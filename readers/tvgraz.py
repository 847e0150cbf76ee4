"""TVGraz (Khan, Saffari and Bischof 2009)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.published import Published, Row, checked, files_below, given_root, is_system_file
from readers.text_files import RejectedRow, only, read_text

TVGRAZ = "http://www.icg.tugraz.at, by its authors (no public copy was found)"
TVGRAZ_IMAGES, TVGRAZ_TEXTS = (".jpg", ".jpeg", ".png", ".gif", ".bmp"), (".xml", ".txt")


def tvgraz(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """TVGraz: pictures from web pages in ten of Caltech-256's categories, with the text of each page.

    dataset.root holds a folder for each category, named as it, with pictures and texts at any depth. A text belongs to
    the picture of its name, `frog/12.jpg` to `frog/12.xml`.

    Known of the published files: ten categories, 4,030 pictures, XML texts in UTF-16 between `<TEXT>` and `</TEXT>`.
    Not known, as no copy was found: file names, folders, and which pairs are for training. So texts in UTF-8 and plain
    texts are read too, and the splits are drawn. For a copy with lists as in UCSD's set take dataset.source wikipedia.

    Raises UserError where there is no folder of a category.
    """
    root = given_root(dataset, TVGRAZ)
    categories = sorted(path.name for path in root.iterdir() if path.is_dir() and not is_system_file(path.name))
    if not categories:
        raise UserError(
            f"dataset.root {root} holds no folders: name a folder with one for each category of TVGraz with "
            f"--dataset.root; published at {TVGRAZ}"
        )
    return Published(root, lambda: read_tvgraz(root, categories), (), lambda: files_below(root, *categories))


def read_tvgraz(root: Path, categories: Iterable[str]) -> Iterator[Row]:
    """Rows of each category's pictures, in the order of their names, and of texts without a picture."""
    for category in categories:
        images: defaultdict[str, list[str]] = defaultdict(list)
        texts: defaultdict[str, list[str]] = defaultdict(list)
        for name in files_below(root, category):
            suffix, stem = Path(name).suffix.lower(), Path(name).stem.strip()
            if suffix in TVGRAZ_IMAGES:
                images[stem].append(name)
            elif suffix in TVGRAZ_TEXTS:
                texts[stem].append(name)
        for stem in sorted(images | texts):
            row = Row((images.get(stem) or texts[stem])[0], category=category)
            try:
                image = only(images.get(stem, ()), f"a picture {category}/{stem}")
                row = replace(row, image=image)
                found = only(texts.get(stem, ()), f"{category}/{stem}{' or '.join(TVGRAZ_TEXTS)}")
                yield checked(root, replace(row, text=read_text(root / found)), found)
            except RejectedRow as error:
                yield replace(row, rejected=error.args)
