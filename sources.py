"""Readers of datasets as their owners publish them: from files to a stream of rows.

A source is one function from the settings to `Published`: where the files lie, which of them to watch for changes, and
a generator of rows. A new dataset is one more such function in SOURCES; nothing else changes.
"""

import codecs
import csv
import functools
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import synthetic
from coco_flickr import coco, flickr30k
from conceptual_captions import conceptual_captions
from config import Settings, UserError
from goodnews import goodnews
from politics import politics
from published import (
    LONGEST_LINE,
    OUTSIDE,
    TOO_LONG,
    Published,
    Row,
    files_below,
    given_root,
    inside,
    lines_of,
    outside,
)


def _unescaped(text: str) -> str:
    """Entities resolved, also those that were escaped again (`&amp;quot;`)."""
    for _ in range(3):
        text, before = html.unescape(text), text
        if text == before:
            break
    return text


# OpenClipart: the drawings in Debian's packages openclipart-png and openclipart-svg

PACKAGES = ("openclipart-png", "openclipart-svg")
LONGEST_METADATA = 100_000  # bytes of an RDF element: title, description and keywords have no more
COLLECTION = 10  # a title or description on more drawings than this is the name of a collection
PLACEHOLDERS = {"hash", "unsorted", "openclipart", "clipart"}  # keywords set by the site's scripts
NOT_TEXT = re.compile(
    r"""
      <!--.*?--> | <[^>]*>                                            # markup
    | \(? \b (?: (?:e-?mail|contact) :? \s* )? [\w.+-]+@[\w-]+\.[\w.-]*\w \)?   # mail addresses
    | \[? (?: https?:// | www\. ) \S+                                 # web addresses
    | HASH\(0x[0-9a-f]+\) | \b0x[0-9a-f]{6,}\b                        # what Perl prints for a list
    | ^ Clipart\ by\ .+?\ -\                                         # "Clipart by Nicu Buculei - beer"
    | ^ EPS\ converted\ from\b | ^ Part\ of\ .* \bCollection\b .* $
    | \.svg $
    | ^ \W* (?:create[ds]?|made|done)\ (?:with|in)\ (?:the\ )? (?:inkscape|sodipodi) \W*
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
LICENCE = re.compile(
    r"creativecommons|public domain (?:dedication|licen[cs]e)|released (?:in)?to the public domain", re.I
)


def openclipart(settings: Settings) -> Published:
    """The drawings of Open Clip Art 0.18 as Debian ships them, with the texts in the SVG originals' RDF metadata.

    dataset.root is the folder that holds png/ and svg/, or one into which the packages were unpacked; null fetches the
    packages (150 MB) into WORK/published. Raises UserError where there is neither.
    """
    given = settings.dataset.root
    top = given_root(settings) if given else settings.work_folder / "published" / "openclipart"
    if not given and not top.is_dir():
        _fetch_debian_packages(PACKAGES, top)
    root = top / "usr" / "share" / "openclipart" if (top / "usr").is_dir() else top
    if not ((root / "png").is_dir() and (root / "svg").is_dir()):
        raise UserError(
            f"{top} holds no folders png and svg; dataset.root must hold them, or be where {' and '.join(PACKAGES)} "
            "were unpacked with `dpkg -x`"
        )
    return Published(root, lambda: read_openclipart(root), (), lambda: files_below(root, "png", "svg"))


def _fetch_debian_packages(packages: tuple[str, ...], folder: Path) -> None:
    """Download Debian packages and unpack them into `folder`, which appears whole or not at all; needs no root."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise UserError(
                f"there is no {tool} here to fetch {' and '.join(packages)} with: set dataset.root to their unpacked "
                "files, or take made-up data with --dataset.source synthetic"
            )

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise UserError(
                f"`{command[0]} {command[1]}` failed ({said}); run `apt-get update`, set dataset.root to the unpacked "
                "packages, or take made-up data with --dataset.source synthetic"
            )

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch:
            print(f"fetching {' and '.join(packages)} with apt-get", flush=True)
            run("apt-get", "download", *packages)
            for package in sorted(Path(scratch).glob("*.deb")):
                run("dpkg", "-x", package.name, "unpacked")
            (Path(scratch) / "unpacked").rename(folder)
    except OSError as error:
        raise UserError(f"cannot fetch {' and '.join(packages)} into {folder}: {error}") from None


def read_openclipart(root: Path) -> Iterator[Row]:
    """Rows of png/CATEGORY/.../NAME.png with the metadata in svg/CATEGORY/.../NAME.svg, in the order of their names.

    Debian replaces a drawing that is the same as another by a link to it, so what a link leads to is the image.
    """
    real_root = root.resolve()
    drawings: list[tuple[str, Path, _Metadata | None]] = []
    for name in files_below(root, "png"):
        if name.endswith(".png"):
            svg = root / "svg" / Path(name).relative_to("png").with_suffix(".svg")
            drawings.append((name, svg, _read_rdf(svg)))
    # What stands on many drawings describes none of them. Links to one file count once.
    known = {svg.resolve(): metadata for _, svg, metadata in drawings if metadata is not None}.values()
    times = Counter(metadata.title for metadata in known) + Counter(metadata.description for metadata in known)
    repeated = {text for text, count in times.items() if count > COLLECTION}
    for name, svg, metadata in drawings:
        image = (root / name).resolve()
        if outside(root, svg.relative_to(root).as_posix()):
            yield Row(name, name, rejected=(OUTSIDE, f"{svg.relative_to(root)} is a link that leads out"))
        elif metadata is None:
            why = "cannot be read" if svg.exists() else "is not there"
            yield Row(name, name, rejected=("no metadata", f"{svg.relative_to(root)} {why}"))
        elif not image.is_relative_to(real_root):
            yield Row(name, name, rejected=(OUTSIDE, "the link leads out of it"))
        else:
            path = image.relative_to(real_root).as_posix()
            yield Row(name, path, openclipart_text(metadata, repeated), category=name.split("/")[1])


@dataclass(frozen=True)
class _Metadata:
    title: str
    description: str
    keywords: tuple[str, ...]
    creator: str


def _read_rdf(svg: Path) -> _Metadata | None:
    """Title, description, keywords and creator in an SVG file's RDF metadata (Dublin Core); None where it has none.

    Only the RDF element is parsed: drawings are long, and without a document type no entity can grow.
    """
    try:
        # Not one regular expression: for a file of many beginnings without an end it would take hours.
        content = svg.read_bytes()
        start = re.search(rb"<rdf:RDF\b", content)
        end = content.find(b"</rdf:RDF>", start.end()) if start else -1
        if start is None or not 0 <= end <= start.end() + LONGEST_METADATA:
            return None
        work = ElementTree.fromstring(content[start.start() : end] + b"</rdf:RDF>").find(".//{*}Work")
    except (OSError, ValueError, LookupError, ElementTree.ParseError):
        return None
    if work is None:
        return None

    def text(element: ElementTree.Element | None) -> str:
        return " ".join("".join(element.itertext()).split()) if element is not None else ""

    return _Metadata(
        title=text(work.find("{*}title")),
        description=text(work.find("{*}description")),
        keywords=tuple(text(item) for item in work.findall("{*}subject//{*}li")),
        creator=text(work.find("{*}creator")),
    )


def openclipart_text(metadata: _Metadata, repeated: Iterable[str] = ()) -> str:
    """`Title. Description. keyword, keyword.` of one drawing, without what is no text about it.

    Left out are titles and descriptions in `repeated` (they name a collection: "Lemon SVG theme"), statements of
    licence and drawing program, placeholders, addresses, the creator's name where it is no more than that, and what
    says the same again. "" where nothing is left.
    """
    parts = [
        "" if part in repeated or LICENCE.search(part) else _as_prose(part)
        for part in (metadata.title, metadata.description)
    ]
    keywords = [_as_prose(keyword) for keyword in metadata.keywords if keyword.casefold() not in PLACEHOLDERS]
    nothing = {"", metadata.creator.casefold()}
    parts = [part for part in parts if part.casefold() not in nothing]
    # Their order is that of a hash table, and differs between drawings with the same keywords.
    parts.append(", ".join(sorted({keyword for keyword in keywords if keyword.casefold() not in nothing})))
    different = {part.rstrip(".").casefold(): part for part in reversed(parts) if part}
    return " ".join(part if part[-1] in ".!?" else part + "." for part in reversed(different.values()))


def _as_prose(text: str) -> str:
    """A title, description or keyword with entities and encodings undone and without what NOT_TEXT matches."""
    text = _unescaped(text)
    try:  # UTF-8 or Windows-1252 that was once read as Latin-1
        octets = text.encode("latin-1")
        text = octets.decode("utf-8")
    except UnicodeEncodeError:
        pass
    except UnicodeDecodeError:
        text = octets.decode("cp1252", errors="replace")
    text = " ".join(NOT_TEXT.sub(" ", text).replace("_", " ").split()).strip(" -,;:")
    return text if re.search(r"\w", text) else ""


# Wikipedia: the layout of UCSD's set (Rasiwasia et al. 2010)

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


# TVGraz (Khan, Saffari and Bischof 2009)

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


# What both read


class _Rejected(Exception):
    """A row that cannot be used: kind and detail."""


def _read_lines(path: Path) -> list[str]:
    """A list file's lines without what stands around them; empty lines at the end do not count."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _by_stem(folder: Path) -> dict[str, list[str]]:
    """The files in `folder` by their name without extension and without blanks around it, as Windows' tools leave."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        found[Path(name).stem.strip()].append(name)
    return found


def _one_file(files: dict[str, list[str]], stem: str, suffixes: tuple[str, ...], wanted: str) -> str:
    """The file of that stem and one of the suffixes: by its exact name, in the order of `suffixes`, else the only one.

    Raises _Rejected where there is none, or several to choose from.
    """
    candidates = [name for name in files.get(stem, ()) if Path(name).suffix.lower() in suffixes]
    exact = [stem + suffix for suffix in suffixes if stem + suffix in candidates]
    if not candidates:
        raise _Rejected("missing file", wanted)
    if not exact and len(candidates) > 1:
        raise _Rejected("ambiguous file", f"{wanted} may be any of {', '.join(map(repr, candidates))}")
    return (exact or candidates)[0]


def _read_text(path: Path) -> str:
    """A text file, or what stands between <text> and </text> in an XML file, all of it where nothing does.

    UTF-8, or UTF-16 where a byte order mark says so. They are not parsed as XML: not all of UCSD's are well-formed, and
    no entity may grow. Raises _Rejected.
    """
    try:
        octets = path.read_bytes()
        is_utf16 = octets.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        content = octets.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _Rejected("unreadable text", f"{path.name}: {error}") from None
    if path.suffix.lower() == ".xml":
        content = "\n".join(re.findall(r"<text\b[^>]*>(.*?)</text>", content, re.DOTALL | re.IGNORECASE)) or content
        content = re.sub(r"<!\[CDATA\[(.*?)\]\]>", r"\1", content, flags=re.DOTALL)
        content = re.sub(r"<[?!/a-zA-Z][^<>]*>", " ", content)
        content = _unescaped(content)
    return content


# Manifest: a table of one's own

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "valid": "val", "test": "test"}
COLUMNS = ("image", "text", "image_id", "category", "split")


def manifest(settings: Settings) -> Published:
    """One's own pairs: CSV, TSV, JSONL or Parquet with columns image and text, optionally image_id, category and split.

    dataset.manifest is its path, as given or relative to dataset.root; image paths are relative to dataset.root, null
    being the manifest's own folder. Raises UserError where the file, a needed column or the format is missing.
    """
    name = settings.dataset.manifest
    if name is None:
        raise UserError("the source manifest needs dataset.manifest, a CSV, TSV, JSONL or Parquet file of pairs")
    root = given_root(settings) if settings.dataset.root else None
    path = Path(name) if Path(name).is_file() or root is None else root / name
    if not path.is_file():
        raise UserError(f"dataset.manifest {name} is not there" + (f", nor is {path}" if str(path) != name else ""))
    if path.suffix.lower() not in RECORDS:
        raise UserError(f"dataset.manifest {path} must end in one of {', '.join(RECORDS)}")
    root = root or path.parent
    return Published(root, lambda: read_manifest(path, root), (path,), lambda: _images_named(path))


def _images_named(path: Path) -> Iterator[str]:
    for _, record in RECORDS[path.suffix.lower()](path):
        if isinstance(record, dict) and isinstance(record.get("image"), str):
            yield record["image"]


def read_manifest(path: Path, root: Path) -> Iterator[Row]:
    """Rows of a manifest. A record that is broken, or whose image lies outside `root`, is a rejected row.

    Raises UserError for an unknown split, and where some rows have a split and others none.
    """
    with_split = without = None
    for label, record in RECORDS[path.suffix.lower()](path):
        if isinstance(record, str):
            yield Row(label, rejected=("bad row", record))
            continue
        values = {name: _as_text(record.get(name)) for name in COLUMNS}
        wrong = [name for name, value in values.items() if value is None and record.get(name) is not None]
        if wrong:
            yield Row(label, rejected=("bad row", f"{wrong[0]} is no text but {record[wrong[0]]!r:.40}"))
            continue
        split = (values["split"] or "").strip().lower() or None
        if split is not None and split not in SPLIT_NAMES:
            raise UserError(f"{path} {label}: split is {values['split']!r} and must be one of {', '.join(SPLIT_NAMES)}")
        with_split, without = (with_split or (split and label)), (without or (None if split else label))
        if with_split and without:
            raise UserError(f"{path}: {with_split} has a split, {without} has none; fill the column or leave it out")
        image = values["image"] or ""
        row = Row(
            label,
            PurePosixPath(image).as_posix() if image else "",
            values["text"] or "",
            image_id=values["image_id"] or None,
            category=values["category"] or None,
            split=split and SPLIT_NAMES[split],
        )
        if not image:
            yield replace(row, rejected=("bad row", "image is empty"))
        elif why := outside(root, row.image):
            yield replace(row, rejected=why)
        else:
            yield row


def _as_text(value: Any) -> str | None:
    """A cell as text; numbers are good enough for ids and categories. None where it is neither."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**30 else None


def _open_text(path: Path) -> TextIO:
    """A UTF-8 file, with or without a byte order mark. What is not UTF-8 stays visible: its row is rejected later."""
    try:
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{path} is UTF-16; save it as UTF-8")
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _demand_columns(path: Path, found: Iterable[str]) -> None:
    found = list(found)
    missing = [name for name in COLUMNS[:2] if name not in found]
    if missing:
        columns = ", ".join(found) or "none"
        raise UserError(f"{path} has no column {' and no column '.join(missing)}; its columns are: {columns:.200}")
    if several := [name for name in COLUMNS if found.count(name) > 1]:
        raise UserError(f"{path} has more than one column {several[0]}; which of them is meant?")


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    csv.field_size_limit(10_000_000)
    with _open_text(path) as file:
        reader = csv.reader(_short_lines(path, file), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"{path}: its first line cannot be read ({error})") from None
        _demand_columns(path, header)
        while True:
            label = f"line {reader.line_num + 1}"  # a quoted text may go over several lines: this is its first
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise UserError(f"{path} {label}: a quote is opened and never closed") from None
                yield label, str(error)
                continue
            if len(fields) == len(header):
                yield label, dict(zip(header, fields, strict=True))
            elif fields:
                yield label, f"has {len(fields)} fields and not {len(header)} as the first line"


def _short_lines(path: Path, file: TextIO) -> Iterator[str]:
    for number, line in lines_of(file):
        if line is None:
            raise UserError(f"{path} line {number} {TOO_LONG}: it is no table")
        yield line


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    checked = False
    with _open_text(path) as file:
        for number, line in lines_of(file):
            if line is None:
                yield f"line {number}", TOO_LONG
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", f"is no JSON: {error}"
                continue
            if not isinstance(record, dict):
                yield f"line {number}", f"is no JSON object: {line.strip():.40}"
                continue
            if not checked:
                _demand_columns(path, record)
                checked = True
            yield f"line {number}", record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    number = itertools.count(1)
    try:
        schema = pq.read_schema(path)
        _demand_columns(path, schema.names)
        wanted = [name for name in COLUMNS if name in schema.names]
        texts = [name for name in wanted if pa.types.is_string(schema.field(name).type)]
        # A file may hold one long text once and name it in all rows: as a dictionary it is one text in memory too.
        file = pq.ParquetFile(path, read_dictionary=texts)
        for batch in file.iter_batches(batch_size=10_000, columns=wanted):
            columns = {name: _python_values(batch.column(name)) for name in wanted}
            for values in zip(*columns.values(), strict=True):
                yield f"row {next(number)}", dict(zip(wanted, values, strict=True))
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Arrow raise anything
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot read {path} from row {next(number)} on: {why}") from None


def _python_values(column: pa.Array) -> list[Any]:
    """A column's values. What is not UTF-8 stays visible, as in `_open_text`, and what is too long is no text."""
    if not (pa.types.is_dictionary(column.type) and pa.types.is_string(column.type.value_type)):
        return column.to_pylist()
    octets = column.dictionary.cast(pa.binary())
    long = pc.greater(pc.binary_length(octets), LONGEST_LINE)
    texts: list[Any] = [
        None if value is None else value.decode(errors="surrogateescape")
        for value in pc.if_else(long, pa.scalar(None, pa.binary()), octets).to_pylist()
    ]
    for place in np.flatnonzero(long.fill_null(False).to_numpy(zero_copy_only=False)).tolist():
        texts[place] = [TOO_LONG]  # a list, which is no text
    return [None if place is None else texts[place] for place in column.indices.to_pylist()]


RECORDS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any] | str]]]] = {
    ".csv": functools.partial(_read_csv, delimiter=","),
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""By a manifest's extension: its records in order, each with where it stands, or with what is wrong with it."""


# Synthetic


def made_up(settings: Settings) -> Published:
    """The made-up dataset, drawn into WORK/published where it does not lie there already."""
    path = synthetic.draw(settings.dataset.synthetic, settings.seed, settings.work_folder / "published" / "synthetic")
    return Published(path.parent, lambda: read_manifest(path, path.parent), (path,), lambda: _images_named(path))


SOURCES: dict[str, Callable[[Settings], Published]] = {
    "openclipart": openclipart,
    "wikipedia": wikipedia,
    "tvgraz": tvgraz,
    "politics": politics,
    "goodnews": goodnews,
    "conceptual_captions": conceptual_captions,
    "coco": coco,
    "flickr30k": flickr30k,
    "manifest": manifest,
    "synthetic": made_up,
}
