"""Wikipedia: the layout of UCSD's set (Rasiwasia et al. 2010)."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.settings import Settings
from readers.published import (
    Published,
    Row,
    _by_stem,
    _one_file,
    _read_lines,
    _read_text,
    _Rejected,
    files_below,
    given_root,
    inside,
)

LISTS = {"train": "trainset_txt_img_cat.list", "test": "testset_txt_img_cat.list"}


def wikipedia(settings: Settings) -> Published:
    """UCSD's Wikipedia set, and other collections in its layout; train and test are the published ones.

    English Wikipedia (Rasiwasia et al. 2010) has the texts in XML. Chinese Wikipedia (Qin et al. 2016), which takes
    dataset.language zh, is read in the same layout: no published copy was found by which its file names and encoding
    could be established. Texts are UTF-8, or UTF-16 with a byte order mark.

    dataset.root holds `trainset_txt_img_cat.list` and `testset_txt_img_cat.list` (lines of text name, image name and
    number of the category), `categories.list` (their names in order), `texts/NAME.xml` or `texts/NAME.txt`, and
    `images/CATEGORY/NAME.jpg`. Raises UserError where one of these is missing.
    """
    root = given_root(settings)
    lists = tuple(root / name for name in (*LISTS.values(), "categories.list"))
    for path in lists:
        if not path.is_file():
            raise UserError(f"{path} is not there; dataset.root must hold {', '.join(path.name for path in lists)}")
    for folder in ("texts", "images"):
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder} is not there; dataset.root must hold the folders texts and images")
    return Published(root, lambda: read_wikipedia(root), lists, lambda: files_below(root, "texts", "images"))


def read_wikipedia(root: Path) -> Iterator[Row]:
    """Rows of the train list, then of the test list. An image lies in the folder of its category, part of its name."""
    categories = _read_lines(root / "categories.list")
    texts = _by_stem(root / "texts")
    images = {category: _by_stem(root / "images" / category) for category in categories}
    for split, name in LISTS.items():
        for number, line in enumerate(_read_lines(root / name), start=1):
            label = f"{name} line {number}"
            fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
            if len(fields) != 3:
                yield Row(label, rejected=("bad row", f"has {len(fields)} fields, not text, image, category: {line!r}"))
                continue
            text_name, image_name, category_number = fields
            if not category_number.isdecimal() or not 1 <= int(category_number) <= len(categories):
                why = f"category {category_number} is not 1 to {len(categories)}, the lines of categories.list"
                yield Row(label, rejected=("bad row", why))
                continue
            category = categories[int(category_number) - 1]
            image = f"images/{category}/{image_name}.jpg"
            try:
                image = f"images/{category}/{_one_file(images[category], image_name, ('.jpg', '.jpeg', '.png'), image)}"
                found = _one_file(texts, text_name, (".xml", ".txt"), f"texts/{text_name}.xml or .txt")
                text = _read_text(root / "texts" / found)
            except _Rejected as error:
                yield Row(label, image, category=category, split=split, rejected=error.args)
                continue
            yield inside(root, Row(label, image, text, category=category, split=split), f"texts/{found}")
