"""What a setting may name: readers, losses, text encoders.

An entry names an object as `module:object`. The module is imported when the object is first used, so that the settings
know all names while no script imports what it does not run. To add one, write the object and name it here.
"""

import importlib
from typing import Any


class Registry(dict[str, str]):
    """Names and the objects they stand for, as `module:object`, in the order in which help lists them."""

    def load(self, name: str) -> Any:
        """The object of that name. Raises KeyError for an unknown name."""
        module, _, attribute = self[name].partition(":")
        return getattr(importlib.import_module(module), attribute)


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
    struc="losses:structure_preserving_loss_terms",
    fine_grained="training.fine_grained:PairwiseLoss",
)
"""`loss.base`."""

TEXT_ENCODERS = Registry(gru="models:GRUEncoder", bag_of_words="models:BagOfWords", graph="models:GraphEncoder")
"""`model.text.encoder` and `siamese.encoder`."""
