"""TVGraz (Khan, Saffari and Bischof 2009)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import UserError
from pipeline.settings import Settings
from readers.published import Published, Row, _read_text, _Rejected, files_below, given_root, inside

TVGRAZ_IMAGES, TVGRAZ_TEXTS = (".jpg", ".jpeg", ".png", ".gif", ".bmp"), (".xml", ".txt")


def tvgraz(settings: Settings) -> Published:
    """TVGraz: pictures from web pages in ten of Caltech-256's categories, with the text of each page.

    dataset.root holds a folder for each category and in it, or in folders below, pictures and texts; a text belongs to
    the picture of its name, `frog/12.jpg` and `frog/12.xml`. The name of the folder is the category.

    What could be established: ten categories, 4,030 pictures with the text of their pages, and, from a program that
    reads them, texts as XML files in UTF-16 with the text between `<TEXT>` and `</TEXT>`. What could not, no copy of
    the files being found: how they were named and filed, and which pairs the literature takes for training and which
    for testing. So the files may lie at any depth below their category, in UTF-8 too and as plain text, and the splits
    are drawn. For a copy with lists as in UCSD's set take the source wikipedia.

    Raises UserError where there is no folder of a category.
    """
    root = given_root(settings)
    categories = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not categories:
        raise UserError(f"dataset.root {root} holds no folders; it must hold one for each category of TVGraz")
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
                image = _only(images.get(stem, ()), f"a picture {category}/{stem}")
                row = replace(row, image=image)
                found = _only(texts.get(stem, ()), f"{category}/{stem}{' or '.join(TVGRAZ_TEXTS)}")
                yield inside(root, replace(row, text=_read_text(root / found)), found)
            except _Rejected as error:
                yield replace(row, rejected=error.args)


def _only(names: Sequence[str], wanted: str) -> str:
    """The one of `names`; raises _Rejected where there is none, or several to choose from."""
    if not names:
        raise _Rejected("missing file", wanted)
    if len(names) > 1:
        raise _Rejected("ambiguous file", f"{wanted} may be any of {', '.join(map(repr, names))}")
    return names[0]
