"""Readers of datasets as their owners publish them: from files to a stream of rows.

A source is a function from the settings to `Published`: where the files are, which of them to watch for changes, and
a generator of rows. To add one, write that function in a file of this folder and name it in SOURCES.
"""

from collections.abc import Callable

from pipeline.settings import Settings
from readers.coco_flickr import coco, flickr30k
from readers.conceptual_captions import conceptual_captions
from readers.goodnews import goodnews
from readers.manifest import manifest
from readers.openclipart import openclipart
from readers.politics import politics
from readers.published import Published
from readers.synthetic import made_up
from readers.tvgraz import tvgraz
from readers.wikipedia import wikipedia

SOURCES: dict[str, Callable[[Settings], Published]] = {
    "openclipart": openclipart,
    "wikipedia": wikipedia,
    "tvgraz": tvgraz,
    "politics": politics,
    "goodnews": goodnews,
    "conceptual_captions": conceptual_captions,
    "coco": coco,
    "flickr30k": flickr30k,
    "manifest": manifest,
    "synthetic": made_up,
}
