"""Splits as people name them, in a column and in the names of files and folders."""

import re
from collections.abc import Iterable

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "valid": "val", "test": "test"}


def splits_by_name(names: Iterable[str]) -> dict[str, str]:
    """The split of each file, where all their names say one: `train/00000.tar`, `test-00000-of-00001.parquet`.

    Where only train and val are there, val is test, as for datasets whose owners keep the test split. Empty where a
    name says none, or several, or where all say the same: splits are drawn then.
    """
    found: dict[str, str] = {}
    for name in names:
        words = {*re.split("[^a-z]+", name.lower())}
        splits = {SPLIT_NAMES[word] for word in words & {*SPLIT_NAMES}}
        if len(splits) != 1:
            return {}
        found[name] = splits.pop()
    there = {*found.values()}
    if "train" not in there or len(there) == 1:
        return {}
    if "test" in there:
        return found
    return {name: "train" if split == "train" else "test" for name, split in found.items()}
