"""Embed any texts or images with a trained run.

    python encode.py --run work/openclipart/runs/NAME --texts texts.txt --out texts.npy
    python encode.py --run work/openclipart/runs/NAME --images FOLDER_OR_LIST --out images.npy

Texts: a file with a text on each line, or .jsonl, where each line is a string or an object with a "text".
Images: a folder (with its subfolders, sorted by path), or a file with a path on each line, relative to that file.

Row i of OUT is line i or image i: float32, rows x dimensions, with PVSE rows x embeddings x dimensions, unit vectors.
A text without a known word and an unreadable image have a row of NaN; stderr names the first. A CSV beside OUT lists
every row with its number, its line or path, and its problem. Files in FOLDER that are no images follow there without a
number; the first are named on stderr.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command_line import Parser, run_script
from pipeline.errors import UserError
from pipeline.output import in_one_line

if TYPE_CHECKING:
    import numpy as np

    from training.encoder import RunEncoder

CHUNK = 4096
"""Items that are encoded between two updates of the progress bar."""
MIN_IMAGES_FOR_PROCESSES = 100
"""Images from which on several processes decode them. Starting the processes takes seconds."""
MAX_PRINTED_PROBLEMS = 10


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out: Path = arguments.out
    items: Sequence[str | Path]
    left_out: dict[Path, str] = {}
    if arguments.texts:
        items, names = read_texts(arguments.texts)
        kind, header = "texts", "line"
    else:
        items, left_out = list_images(arguments.images)
        names, kind, header = [str(path) for path in items], "images", "path"

    import numpy as np

    from pipeline.files import open_array, written_whole
    from training.encoder import RunEncoder

    encoder = RunEncoder(arguments.run, arguments.device, arguments.expand)
    with written_whole(out) as vectors_path, written_whole(out.with_suffix(".csv")) as csv_path:
        vectors = open_array(vectors_path, (len(items), *encoder.shape), np.float32)
        problems = encode(encoder, kind, items, vectors)
        if len(problems) == len(items):
            raise UserError(f"none of the {len(items):,} {kind} can be encoded; {header} {names[0]}: {problems[0]}")
        vectors.flush()
        write_rows(csv_path, header, names, problems, left_out)

    said = [f"{header} {in_one_line(names[row])}: {why}; row {row} is NaN" for row, why in problems.items()]
    warn(said, "rows are NaN", out.with_suffix(".csv"))
    warn(
        [f"{in_one_line(path)}: {why}; left out" for path, why in left_out.items()],
        "are left out",
        out.with_suffix(".csv"),
    )
    shape = " x ".join(map(str, vectors.shape))
    if left_out:
        every = len(items) + len(left_out)
        print(f"{every:,} files: {len(items):,} images, {len(left_out):,} left out")
    print(f"{len(items) - len(problems):,} of {len(items):,} {kind} encoded: {shape}, float32, length 1")
    print(f"wrote {out}")
    print(f"wrote {out.with_suffix('.csv')}")


def encode(encoder: "RunEncoder", kind: str, items: Sequence[str | Path], vectors: "np.ndarray") -> dict[int, str]:
    """Write the embeddings of `texts` or `images` into `vectors`, chunk by chunk. Returns problems by row number."""
    from pipeline.progress import ProgressBar
    from training.image_sources import worker_count

    problems: dict[int, str] = {}
    with ProgressBar(total=len(items), desc=kind, unit=kind[:-1]) as progress:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            if kind == "texts":
                part, found = encoder.texts([str(text) for text in chunk])
            else:
                workers = (
                    worker_count(encoder.settings.training.workers) if len(chunk) > MIN_IMAGES_FOR_PROCESSES else 0
                )
                part, found = encoder.images(chunk, workers=workers)
            vectors[start : start + len(chunk)] = part
            problems |= {start + row: why for row, why in found.items()}
            progress.update(len(chunk))
    return problems


def warn(lines: Sequence[str], what: str, table: Path) -> None:
    """Print the first of the lines on stderr, and how many more there are in `table`."""
    for line in lines[:MAX_PRINTED_PROBLEMS]:
        print(in_one_line(line), file=sys.stderr)
    if len(lines) > MAX_PRINTED_PROBLEMS:
        print(f"and {len(lines) - MAX_PRINTED_PROBLEMS:,} more {what}, in {table}", file=sys.stderr)


def write_rows(
    path: Path, header: str, names: Sequence[str], problems: Mapping[int, str], left_out: Mapping[Path, str]
) -> None:
    """Write the CSV of rows, names and problems, in UTF-8: a byte of a file's name that is none is `\\udcNN`.

    What is left out stands behind the rows, without a row number.
    """
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["row", header, "problem"])
        rows.writerows([row, name, problems.get(row, "")] for row, name in enumerate(names))
        rows.writerows(["", path, why] for path, why in left_out.items())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError where `--out` is no .npy file."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, WORK/runs/NAME")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--texts", type=Path, help="file with a text on each line, or .jsonl")
    what.add_argument("--images", type=Path, help="folder with images, or file with a path on each line")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    parser.add_argument(
        "--expand",
        type=float,
        metavar="W",
        help="weight of the nearest train pairs (default: the run's evaluation.expand; see docs/expansion.md)",
    )
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".npy":
        raise UserError(f"--out {arguments.out} must end in .npy")
    given, table = arguments.texts or arguments.images, arguments.out.with_suffix(".csv")
    if given.resolve() == table.resolve():
        raise UserError(f"--out {arguments.out} would overwrite {given}: its table is {table}; give another name")
    return arguments


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """The texts of a file, and their line numbers from 1.

    Raises UserError where the file cannot be read or is empty, and for a line of .jsonl that holds no text.
    """
    from pipeline.given_arrays import read_lines

    lines = read_lines(path, "--texts")
    if not lines:
        raise UserError(f"--texts {path} is empty")
    if path.suffix == ".jsonl":
        lines = [_text_of_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    return lines, [str(number) for number in range(1, len(lines) + 1)]


def _text_of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
        text = value["text"] if isinstance(value, dict) else value
    except (ValueError, KeyError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{where} is neither a JSON string nor an object with a "text"')
    return text


def list_images(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """The image files in a folder, sorted by path, or those that a file lists.

    Also returns everything else in the folder, and why it is left out. Raises UserError if there is no image.
    """
    if path.is_dir():
        from PIL import Image

        from images.files import FORMATS

        suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
        reasons = dict(sorted(files_below(path, suffixes)))
        found = [file for file, why in reasons.items() if not why]
        left_out = {file: why for file, why in reasons.items() if why}
        if not found:
            first = "".join(f"; {file}: {why}" for file, why in list(left_out.items())[:1])
            raise UserError(f"--images {path} holds no image; known suffixes are {', '.join(sorted(suffixes))}{first}")
        return found, left_out
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")  # names are any bytes
    except OSError as error:
        raise UserError(f"--images {path} is neither a folder nor a file with a path on each line: {error}") from None
    found = [path.parent / line for line in lines if line.strip()]
    if not found:
        raise UserError(f"--images {path} names no image")
    return found, {}


def files_below(folder: Path, suffixes: Collection[str]) -> Iterator[tuple[Path, str]]:
    """All files in a folder and its subfolders, each with the reason why it is no image, "" where it may be one."""
    failed: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=failed.append):
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                yield Path(parent, name), "a link to a folder is not followed"
        for name in names:
            file = Path(parent, name)
            if file.suffix.lower() not in suffixes:
                yield file, f"{file.suffix} is no suffix of an image" if file.suffix else "has no suffix"
            elif not file.is_file():
                yield file, "a link that leads nowhere" if file.is_symlink() else "is no file"
            else:
                yield file, ""
    for error in failed:
        yield Path(error.filename), f"the folder cannot be listed: {error.strerror}"


if __name__ == "__main__":
    run_script(main)
