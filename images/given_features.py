"""Features of the dataset's images that users bring in a .npy file, `features:FILE.npy`.

Row i is the image that line i of a list names: of FILE.csv, as encode.py writes it, or else of images.txt beside the
file. A line is an image path as in pairs.parquet, an absolute path, or one that is relative to the list or to the
current folder.
"""

import csv
import os
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.given_arrays import read_given, read_lines, rows_by_name, taken
from pipeline.pairs import Images

SETTING = "model.image.backbone"


def list_of(path: Path) -> Path:
    """The list that names the rows of a file. Raises UserError where there is none."""
    for listed in (path.with_suffix(".csv"), path.with_name("images.txt")):
        if listed.is_file():
            return listed
    raise UserError(
        f"{SETTING}: beside {path} is neither {path.with_suffix('.csv').name} nor images.txt; put images.txt there, "
        "with the image path of each row on a line"
    )


def given_features(path: Path, images: Images) -> np.ndarray:
    """Features (I, 2, F), float32, of the dataset's images by number; a mirror image has those of the image.

    Raises UserError where the file, the list or an image in it is missing.
    """
    array, listed = read_given(path, SETTING), list_of(path)
    if listed.suffix == ".csv":
        try:
            with listed.open(newline="", encoding="utf-8-sig") as file:
                # Files that encode.py left out stand at the end, without a row number.
                lines = [row.get("path") or "" for row in csv.DictReader(file) if row.get("row") != ""]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{SETTING}: cannot read {listed}: {error}; it must be a CSV file in UTF-8") from None
    else:
        lines = read_lines(listed, SETTING)
    known, by_file = {*images.paths}, {os.path.abspath(images.root / path): path for path in images.paths}
    names = []
    for line in lines:
        places = (os.path.abspath(listed.parent / line), os.path.abspath(line))
        found = next((by_file[place] for place in places if place in by_file), line)
        names.append(line if line in known else found)
    features = taken(array, rows_by_name(array, names, images.paths, listed, SETTING), path, SETTING)
    return np.broadcast_to(features[:, None], (len(features), 2, features.shape[1]))
