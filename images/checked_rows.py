"""Rows of a large array on disk, verified as they are read: to verify the whole file would read all of it."""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError


def row_checksums(rows: Iterable[np.ndarray]) -> np.ndarray:
    """CRC-32 of the bytes of each row, (N,) uint32."""
    return np.array([zlib.crc32(np.ascontiguousarray(row).data) for row in rows], dtype=np.uint32)


class CheckedRows:
    """An array in a file. A row is verified when this process first reads it.

    Args:
        array: (I, ...) or (I, J, ...), memory-mapped.
        checksums: of each row, (I,) or (I, J) uint32; None for a file of an earlier version, which has none.
        folder: what to remove where a row is damaged.
    """

    def __init__(self, array: np.ndarray, checksums: np.ndarray | None, folder: Path) -> None:
        self.array, self.checksums, self.folder = array, checksums, folder
        self.shape = array.shape
        if checksums is not None:
            if checksums.dtype != np.uint32 or checksums.shape != array.shape[: checksums.ndim]:
                raise ValueError(f"its checksums are {checksums.dtype} {checksums.shape}")
            self.verified = np.zeros(checksums.shape, dtype=bool)

    def __len__(self) -> int:
        return len(self.array)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.array

    def __getitem__(self, index: Any) -> np.ndarray:
        """The rows at `index`, an array or, for (I, J), a pair of arrays. Raises UserError where one is damaged."""
        rows: np.ndarray = self.array[index]
        if self.checksums is not None:
            new = np.flatnonzero(~self.verified[index])
            if not np.array_equal(row_checksums(rows[place] for place in new), self.checksums[index][new]):
                raise UserError(f"{self.folder} is damaged: it has changed since it was written; remove that folder")
            self.verified[index] = True
        return rows
