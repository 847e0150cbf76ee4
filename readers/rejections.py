"""Why a row is left out, by kind, and what to do about each kind."""

from typing import NamedTuple

OUTSIDE, LINK = "outside the root", "link out of the root"
"""`dataset.follow_links` accepts the second."""
ADDRESS, FOREIGN_PATH = "address", "path of another system"
NO_TEXT = "no text"

REMEDIES = {
    "bad row": "mend the row in the file that holds it, or leave it out; the reason says what is wrong with it",
    NO_TEXT: "write the text that belongs to the picture, or move the picture away",
    "empty text": "fill in the text, or leave the row out",
    "short text": "lower dataset.min_characters",
    "long text": "cut the text off: it is longer than a book and may be many texts",
    "unreadable text": "save the text as UTF-8",
    "no metadata": "fetch the files again, or leave the picture out",
    "missing file": "put the file there, or set dataset.root to the folder that paths are relative to",
    "ambiguous file": "rename or move all but one of the files",
    "unreadable image": "save or fetch the image again; for its pixels raise dataset.max_pixels, for HEIC install "
    "pillow-heif",
    OUTSIDE: "set dataset.root to a folder that holds all images, and write paths without `..`",
    LINK: "copy the file to where the link is, or set dataset.follow_links to true",
    ADDRESS: "download the images with img2dataset, and take dataset.source webdataset",
    FOREIGN_PATH: "write paths with / and relative to dataset.root",
    "in no split": "add the image to a split's list, or leave the row out",
    "image_id of another image": "give each image file an image_id of its own",
    "image of another image_id": "give all rows of an image file the same image_id",
    "image of another split": "leave the row out, or set dataset.published_splits to false to draw splits anew",
    "duplicate": "nothing: the pair is kept once",
    "near-duplicate": "nothing: the first of these texts is kept; dataset.near_duplicates false keeps all",
}
"""By kind, what a user does about a rejected row. docs/data.md has the same table."""


class Rejection(NamedTuple):
    """Why a row is left out. Rows are counted by `kind`."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return self.kind + ("" if not self.detail else " " if self.detail.startswith("of ") else ": ") + self.detail

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return REMEDIES.get(self.kind, REMEDIES["bad row"])
