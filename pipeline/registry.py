"""What a setting may name: readers, losses, text encoders, spaces.

An entry names an object as `module:object`. The module is imported when the object is first used, so that the settings
know all names while no script imports what it does not run. To add one, write the object and name it here.
"""

import importlib
from typing import Any

from pipeline.errors import UserError
from pipeline.home import expanded


class Registry(dict[str, str]):
    """Names and the objects they stand for, as `module:object`, in the order in which help lists them.

    A name such as `features:FILE.npy` stands for every text that begins with `features:`.
    """

    def key(self, name: str) -> str | None:
        """The registered name that `name` is, or begins as; None for an unknown one."""
        if name in self:
            return name
        return next((known for known in self if ":" in known and is_kind(name, known)), None)

    def load(self, name: str) -> Any:
        """The object of that name. Raises KeyError for an unknown name."""
        module, _, attribute = self[self.key(name) or name].partition(":")
        return getattr(importlib.import_module(module), attribute)


def is_kind(value: object, wanted: object) -> bool:
    """Whether a setting's value is `wanted`, or begins as `wanted` where that is a name such as `features:FILE.npy`."""
    if value == wanted:
        return True
    if not (isinstance(value, str) and isinstance(wanted, str) and ":" in value and ":" in wanted):
        return False
    return value.partition(":")[0] == wanted.partition(":")[0] and value.partition(":")[2] != ""


def argument(value: str) -> str:
    """What stands behind the colon of a value such as `features:FILE.npy`, with `~` and `$VARIABLE` replaced.

    Raises UserError where they stand for nothing.
    """
    try:
        return expanded(value.partition(":")[2])
    except ValueError as error:
        raise UserError(f"{value} must name {error}") from None


READERS = Registry(
    openclipart="readers.openclipart:openclipart",
    wikipedia="readers.wikipedia:wikipedia",
    tvgraz="readers.tvgraz:tvgraz",
    politics="readers.politics:politics",
    goodnews="readers.goodnews:goodnews",
    conceptual_captions="readers.conceptual_captions:conceptual_captions",
    coco="readers.coco_flickr:coco",
    flickr30k="readers.coco_flickr:flickr30k",
    manifest="readers.manifest:manifest",
    folder="readers.folder:folder",
    webdataset="readers.webdataset:webdataset",
    huggingface="readers.huggingface:huggingface",
    synthetic="readers.synthetic:made_up",
)
"""`dataset.source`: readers of published files."""

FILES_IN_ROOT = {
    "wikipedia": "texts/, images/ and the .list files",
    "tvgraz": "a folder for each category",
    "politics": "complete_db.pickle, train_test_paths.pickle and imgs/",
    "goodnews": "captioning_dataset.json, img_splits.json and images/",
    "conceptual_captions": "the two TSVs, train/ and val/",
    "coco": "annotations/ (or dataset_coco.json) and train2017/ and val2017/",
    "flickr30k": "the captions (or dataset_flickr30k.json) and the images",
    "folder": "pictures, and beside each its text: NAME.jpg and NAME.txt",
    "webdataset": "tar shards, such as img2dataset writes",
    "huggingface": "Parquet files with the images in them, or what save_to_disk wrote",
}
"""Readers that need `dataset.root`, and what they read in it."""

LOSSES = Registry(
    angular="losses:angular_npairs_loss",
    triplet="losses:triplet_npairs_loss",
    infonce="losses:infonce_loss",
    struc="losses:structure_preserving_loss_terms",
    fine_grained="training.fine_grained:PairwiseLoss",
)
"""`loss.base`."""

TEXT_ENCODERS = Registry(
    {
        "gru": "models:GRUEncoder",
        "bag_of_words": "models:BagOfWords",
        "graph": "models:GraphEncoder",
        "sentence_transformers:NAME_OR_FOLDER": "training.text_streams:SentenceEncoder",
        "features:FILE.npy": "training.text_streams:GivenVectors",
    }
)
"""`model.text.encoder` and `siamese.encoder`."""

SPACES = Registry(
    {
        "doc2vec": "text_space.spaces:of_doc2vec",
        "images": "text_space.spaces:of_images",
        "both": "text_space.spaces:of_both",
        "sentences": "text_space.spaces:of_sentences",
        "sentences:NAME_OR_FOLDER": "text_space.spaces:of_sentences",
        "file:VECTORS.npy": "text_space.spaces:of_file",
    }
)
"""`neighbors.space`: vectors of all pairs."""
