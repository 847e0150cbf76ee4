"""Vectors that users bring in a .npy file: a row for each pair, or for each line of a list beside it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.files import read_array

ROWS_AT_A_TIME = 10_000


def read_given(path: Path, setting: str) -> np.ndarray:
    """The array (R, F) of a file, memory-mapped. Raises UserError where it holds no rows of numbers."""
    if not path.is_file():
        raise UserError(f"{setting}: there is no file {path}")
    array = read_array(path)
    if array.ndim != 2 or not len(array) or not array.shape[1] or array.dtype.kind not in "fiu":
        raise UserError(f"{setting}: {path} holds {array.dtype} {array.shape}, and rows of numbers are needed")
    return array


def read_lines(path: Path, setting: str) -> list[str]:
    """The lines of a list. Raises UserError where it is no text in UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}: cannot read {path}: {error}; it must be a text file in UTF-8") from None
    return lines[:-1] if lines[-1] == "" else lines


def rows_by_name(
    array: np.ndarray, names: Sequence[str], wanted: Sequence[str], where: Path, setting: str
) -> np.ndarray:
    """The row of each of the `wanted` names, (N,) int64; of a name that is listed twice, the first.

    Raises UserError where the list has another length than the array, or lacks a name.
    """
    if len(names) != len(array):
        raise UserError(f"{setting}: {where} has {len(names):,} lines for the {len(array):,} rows of the array")
    row_of = {name: row for row, name in reversed([*enumerate(names)])}
    rows = np.array([row_of.get(name, -1) for name in wanted], dtype=np.int64)
    if (rows < 0).any():
        first = wanted[int(np.argmin(rows))]
        raise UserError(
            f"{setting}: {where} does not list {int((rows < 0).sum()):,} of {len(wanted):,} items, the first: "
            f"{first[:80]!r}; add them"
        )
    return rows


def taken(array: np.ndarray, rows: np.ndarray, path: Path, setting: str) -> np.ndarray:
    """`rows` of the array, float32; memory-mapped where these are all its rows in order.

    Raises UserError where a row is NaN or infinite.
    """
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = rows[start : start + ROWS_AT_A_TIME]
        finite = np.isfinite(array[part]).all(axis=1)
        if not finite.all():
            raise UserError(
                f"{setting}: row {part[np.argmin(finite)]} of {path} is NaN or infinite; leave such rows out"
            )
    if array.dtype == np.float32 and np.array_equal(rows, np.arange(len(array))):
        return array
    return array[rows].astype(np.float32)


def vectors_of_texts(path: Path, texts: Sequence[str], setting: str) -> np.ndarray:
    """Vectors (N, F) of N texts from a file: a row a pair or, where texts.txt lies beside it, a row a line of that.

    A line is a text with every run of white space as one blank. Raises UserError where the file does not have them all.
    """
    array, listed = read_given(path, setting), path.with_name("texts.txt")
    if listed.is_file():
        wanted = [" ".join(text.split()) for text in texts]
        names = [" ".join(line.split()) for line in read_lines(listed, setting)]
        rows = rows_by_name(array, names, wanted, listed, setting)
    elif len(array) == len(texts):
        rows = np.arange(len(texts))
    else:
        raise UserError(
            f"{setting}: {path} has {len(array):,} rows for {len(texts):,} pairs; give a row a pair, or put texts.txt "
            "beside it with the text of each row on a line"
        )
    return taken(array, rows, path, setting)
