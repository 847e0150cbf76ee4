"""Wikipedia: the layout of UCSD's set (Rasiwasia et al. 2010)."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.published import Published, Row, checked, files_below, given_root
from readers.text_files import RejectedRow, choose_file, files_by_stem, read_lines, read_text

WIKIPEDIA = "http://www.svcl.ucsd.edu/projects/crossmodal/, in whose layout the files must lie"
LISTS = {"train": "trainset_txt_img_cat.list", "test": "testset_txt_img_cat.list"}


def wikipedia(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """UCSD's Wikipedia set, and other collections in its layout. Train and test are the published ones.

    dataset.root holds

    - `trainset_txt_img_cat.list` and `testset_txt_img_cat.list`, lines of text name, image name, category number,
    - `categories.list`, the names of the categories in order,
    - `texts/NAME.xml` or `texts/NAME.txt`, in UTF-8, or in UTF-16 with a byte order mark,
    - `images/CATEGORY/NAME.jpg`.

    English Wikipedia (Rasiwasia et al. 2010) has XML texts. Chinese Wikipedia (Qin et al. 2016) takes dataset.language
    zh. No published copy of it was found, so that its file names and encoding are assumed to be the same.
    Raises UserError where a list or folder is missing.
    """
    root = given_root(dataset, WIKIPEDIA)
    lists = tuple(root / name for name in (*LISTS.values(), "categories.list"))
    for path in lists:
        if not path.is_file():
            names = ", ".join(path.name for path in lists)
            raise UserError(f"{path} is not there; --dataset.root must name a folder with {names}; see {WIKIPEDIA}")
    for folder in ("texts", "images"):
        if not (root / folder).is_dir():
            what = "a folder with texts and images"
            raise UserError(f"{root / folder} is not there; --dataset.root must name {what}; see {WIKIPEDIA}")
    return Published(root, lambda: read_wikipedia(root), lists, lambda: files_below(root, "texts", "images"))


def read_wikipedia(root: Path) -> Iterator[Row]:
    """Rows of the train list, then of the test list. The folder of an image is its category."""
    categories = read_lines(root / "categories.list")
    texts = files_by_stem(root / "texts")
    images = {category: files_by_stem(root / "images" / category) for category in categories}
    for split, name in LISTS.items():
        for number, line in enumerate(read_lines(root / name), start=1):
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
                image_file = choose_file(images[category], image_name, (".jpg", ".jpeg", ".png"), image)
                image = f"images/{category}/{image_file}"
                found = choose_file(texts, text_name, (".xml", ".txt"), f"texts/{text_name}.xml or .txt")
                text = read_text(root / "texts" / found)
            except RejectedRow as error:
                yield Row(label, image, category=category, split=split, rejected=error.args)
                continue
            yield checked(root, Row(label, image, text, category=category, split=split), f"texts/{found}")
