"""OpenClipart: the drawings in the Debian packages openclipart-png and openclipart-svg."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.schema import Dataset
from readers.published import Published, Row, files_below, given_root, outside
from readers.rejections import OUTSIDE
from readers.text_files import unescaped
from readers.whole_folder import written_whole_folder

PACKAGES = ("openclipart-png", "openclipart-svg")
DEBIAN = "Debian, as the packages openclipart-png and openclipart-svg (https://packages.debian.org)"

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


def openclipart(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """The drawings of Open Clip Art 0.18 as Debian ships them, with the texts in the SVG originals' RDF metadata.

    dataset.root is the folder that holds png/ and svg/, or one into which the packages were unpacked. Null fetches the
    packages (150 MB) into `published_folder`. Raises UserError where neither is possible.
    """
    given = dataset.root
    top = given_root(dataset, DEBIAN) if given else published_folder / "openclipart"
    if not given and not top.is_dir():
        _fetch_debian_packages(PACKAGES, top)
    root = top / "usr" / "share" / "openclipart" if (top / "usr").is_dir() else top
    if not ((root / "png").is_dir() and (root / "svg").is_dir()):
        raise UserError(
            f"{top} holds no folders png and svg: name their folder with --dataset.root, or the one into which "
            f"{' and '.join(PACKAGES)} were unpacked with `dpkg -x`; published at {DEBIAN}"
        )
    return Published(root, lambda: read_openclipart(root), (), lambda: files_below(root, "png", "svg"))


def _fetch_debian_packages(packages: tuple[str, ...], folder: Path) -> None:
    """Download Debian packages and unpack them into `folder`, which appears whole or not at all. Needs no root."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise UserError(
                f"there is no {tool} here to fetch {' and '.join(packages)} with: name the folder of their unpacked "
                "files with --dataset.root, or take made-up data with --dataset.source synthetic"
            )

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_whole_folder(folder) as new:
            print(f"fetching {' and '.join(packages)} with apt-get", flush=True)
            _run(new, "apt-get", "download", *packages)
            for package in sorted(new.glob("*.deb")):
                _run(new, "dpkg", "-x", package.name, ".")
                package.unlink()
    except OSError as error:
        raise UserError(f"cannot fetch {' and '.join(packages)} into {folder}: {error}") from None


def _run(folder: Path, *command: str) -> None:
    """Run a command in `folder`. Raises UserError with the last line that it wrote, where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f"`{command[0]} {command[1]}` failed ({said}); run `apt-get update`, name the folder of the unpacked "
            "packages with --dataset.root, or take made-up data with --dataset.source synthetic"
        )


def read_openclipart(root: Path) -> Iterator[Row]:
    """Rows of png/CATEGORY/.../NAME.png with the metadata in svg/CATEGORY/.../NAME.svg, in the order of their names.

    Debian replaces copies of a drawing by links to it: the image of a row is the target of the link.
    """
    real_root = root.resolve()
    drawings: list[tuple[str, Path, _Metadata | None]] = []
    for name in files_below(root, "png"):
        if name.endswith(".png"):
            svg = root / "svg" / Path(name).relative_to("png").with_suffix(".svg")
            drawings.append((name, svg, _read_rdf(svg)))
    # A title on many drawings describes none of them. Links to one file count once.
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
    """Title, description, keywords and creator in an SVG file's RDF metadata (Dublin Core). None where it has none.

    Only the RDF element is parsed: drawings are long, and without a document type no entity can expand.
    """
    try:
        # One regular expression would take hours on a file of many beginnings without an end.
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

    Left out are

    - titles and descriptions in `repeated`: they name a collection ("Lemon SVG theme"),
    - statements of licence and drawing program, placeholders and addresses,
    - the creator's name where nothing else is said,
    - repetitions.

    "" where nothing is left.
    """
    parts = [
        "" if part in repeated or LICENCE.search(part) else _as_prose(part)
        for part in (metadata.title, metadata.description)
    ]
    keywords = [_as_prose(keyword) for keyword in metadata.keywords if keyword.casefold() not in PLACEHOLDERS]
    nothing = {"", metadata.creator.casefold()}
    parts = [part for part in parts if part.casefold() not in nothing]
    # Sorted: the published order is that of a hash table.
    parts.append(", ".join(sorted({keyword for keyword in keywords if keyword.casefold() not in nothing})))
    different = {part.rstrip(".").casefold(): part for part in reversed(parts) if part}
    return " ".join(part if part[-1] in ".!?" else part + "." for part in reversed(different.values()))


def _as_prose(text: str) -> str:
    """A title, description or keyword without entities, wrong encodings, and what NOT_TEXT matches."""
    text = unescaped(text)
    try:  # UTF-8 or Windows-1252 that was once read as Latin-1
        octets = text.encode("latin-1")
        text = octets.decode("utf-8")
    except UnicodeEncodeError:
        pass
    except UnicodeDecodeError:
        text = octets.decode("cp1252", errors="replace")
    text = " ".join(NOT_TEXT.sub(" ", text).replace("_", " ").split()).strip(" -,;:")
    return text if re.search(r"\w", text) else ""
