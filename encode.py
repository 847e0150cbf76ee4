"""Embeddings of anybody's texts or images from a trained run, as .npy for an index of one's own.

    python encode.py --run work/openclipart/runs/NAME --texts texts.txt --out texts.npy
    python encode.py --run work/openclipart/runs/NAME --images FOLDER_OR_LIST --out images.npy

Texts: a text a line, or .jsonl, where a line is a string or has a "text". Images: those of a folder and the folders in
it, by path, or of a file with a path a line (relative to that file's folder). Row i of OUT (float32, rows x dimensions,
of PVSE rows x embeddings x dimensions, of length 1) is the i-th line or image. A text without a known word and an image
that cannot be read keep their row, which is NaN, and are named on stderr. A CSV beside OUT names every row: its number,
line or path, and what is wrong with it.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from images.files import FORMATS
from pipeline.command_line import run_script
from pipeline.errors import UserError
from pipeline.files import open_array, written_whole
from training.embedding import worker_count
from training.encoder import RunEncoder

SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
AT_A_TIME = 4096
WORTH_PROCESSES = 100
"""Images from which on other processes decode them: these take seconds to start."""
SHOWN = 10
"""Problems that are told one by one; the CSV has them all."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, WORK/runs/NAME")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--texts", type=Path, help="file with a text a line, or .jsonl")
    what.add_argument("--images", type=Path, help="folder with images, or file with a path a line")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if any")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    if out.suffix != ".npy":
        raise UserError(f"--out {out} must end in .npy")
    items: Sequence[str | Path]
    if arguments.texts:
        items, names = read_texts(arguments.texts)
        header, what_is_encoded = "line", "texts"
    else:
        items = list_images(arguments.images)
        names, header, what_is_encoded = [str(path) for path in items], "path", "images"

    encoder = RunEncoder(arguments.run, arguments.device)
    problems: dict[int, str] = {}
    with written_whole(out) as beside, written_whole(out.with_suffix(".csv")) as names_beside:
        vectors = open_array(beside, (len(items), *encoder.shape), np.float32)
        with tqdm(total=len(items), desc=what_is_encoded, unit=what_is_encoded[:-1], disable=None) as progress:
            for start in range(0, len(items), AT_A_TIME):
                part = items[start : start + AT_A_TIME]
                if arguments.texts:
                    vectors[start : start + len(part)], found = encoder.texts(part)
                else:
                    workers = worker_count(encoder.settings) if len(part) > WORTH_PROCESSES else 0
                    vectors[start : start + len(part)], found = encoder.images(part, workers=workers)
                problems |= {start + row: why for row, why in found.items()}
                progress.update(len(part))
        if len(problems) == len(items):
            raise UserError(
                f"none of the {len(items):,} {what_is_encoded} can be encoded; {header} {names[0]}: {problems[0]}"
            )
        vectors.flush()
        with names_beside.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["row", header, "problem"])
            rows.writerows([row, name, problems.get(row, "")] for row, name in enumerate(names))

    for row in list(problems)[:SHOWN]:
        print(f"{header} {names[row]}: {problems[row]}; row {row} is NaN", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN:,} more, in {out.with_suffix('.csv')}", file=sys.stderr)
    shape = " x ".join(map(str, vectors.shape))
    print(f"{len(items) - len(problems):,} of {len(items):,} {what_is_encoded} encoded: {shape}, float32, length 1")
    print(f"wrote {out}")
    print(f"wrote {out.with_suffix('.csv')}")


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """The texts of a file and the number of each one's line, from 1.

    Raises UserError, naming the line, where it cannot be read or is no JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --texts {path}: {error}; it must be a text file in UTF-8") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UserError(f"--texts {path} is empty")
    if path.suffix == ".jsonl":
        lines = [_text_of(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    return lines, [str(number) for number in range(1, len(lines) + 1)]


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
        text = value["text"] if isinstance(value, dict) else value
    except (ValueError, KeyError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{where} is neither a JSON string nor an object with a "text"')
    return text


def list_images(path: Path) -> list[Path]:
    """The image files of a folder, by path, or those that a file lists.

    Raises UserError where there are none.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise UserError(f"--images {path} holds no image; known are {', '.join(sorted(SUFFIXES))}")
        return found
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--images {path} is neither a folder nor a file with a path a line: {error}") from None
    found = [path.parent / line for line in lines if line.strip()]
    if not found:
        raise UserError(f"--images {path} names no image")
    return found


if __name__ == "__main__":
    run_script(main)
