"""Spaces in which step 3 looks up neighbors: vectors of all pairs, by `neighbors.space`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.devices import choose_device
from pipeline.files import fingerprint, read_array
from pipeline.given_arrays import read_given, vectors_of_texts
from pipeline.pairs import read_pairs
from pipeline.registry import SPACES, argument
from pipeline.schema import Settings
from pipeline.steps import EXTRACT_DOC2VEC, EXTRACT_IMAGES, require
from pipeline.work import Work
from text_space.sentences import cached_vectors, encoder_fingerprint, encoder_folder

SETTING = "neighbors.space"


class Space(NamedTuple):
    """Vectors of all pairs."""

    vectors: Callable[[], np.ndarray]
    """(N, d), a row a pair. Raises UserError where they cannot be had."""
    made_from: Mapping[str, str]
    """Fingerprints of what lies outside WORK, by name."""
    images: Callable[[], np.ndarray] | None = None
    """Second vectors of all pairs, (N, e), where neighbors are ranked by both (`text_space.points.points_of_both`)."""


def space_of(settings: Settings) -> Space:
    """The space of `neighbors.space`. Raises UserError where its files are missing."""
    space: Space = SPACES.load(settings.neighbors.space)(settings)
    return space


def of_doc2vec(settings: Settings) -> Space:
    """Omega, as step 2 wrote it."""

    def vectors() -> np.ndarray:
        require(EXTRACT_DOC2VEC, settings)
        return read_array(Work(settings.work_folder).vectors)

    return Space(vectors, {})


def of_images(settings: Settings) -> Space:
    """Pretrained features of each pair's image, as extract_image_features.py wrote them."""

    def vectors() -> np.ndarray:
        require(EXTRACT_IMAGES, settings)
        return read_array(Work(settings.work_folder).image_vectors)

    return Space(vectors, {})


def of_both(settings: Settings) -> Space:
    """Omega and the images' features: neighbors are near in both."""
    return Space(of_doc2vec(settings).vectors, {}, of_images(settings).vectors)


def of_sentences(settings: Settings) -> Space:
    """The vectors of a sentence encoder: the one that is named, or that of model.text.encoder."""
    named = argument(settings.neighbors.space) or argument(settings.model.text.encoder)
    folder = encoder_folder(named, SETTING)

    def vectors() -> np.ndarray:
        texts = read_pairs(settings.work_folder, ["text"])["text"].to_pylist()
        return cached_vectors(folder, texts, settings.features_folder, choose_device(settings.training.device))

    return Space(vectors, {f"encoder of {SETTING}": encoder_fingerprint(folder)})


def of_file(settings: Settings) -> Space:
    """The vectors in a file, by pair number or by the lines of texts.txt beside it."""
    path = Path(argument(settings.neighbors.space))
    read_given(path, SETTING)
    listed = path.with_name("texts.txt")

    def vectors() -> np.ndarray:
        texts = read_pairs(settings.work_folder, ["text"])["text"].to_pylist()
        return vectors_of_texts(path, texts, SETTING)

    return Space(vectors, {str(one): fingerprint(one) for one in (path, listed) if one.is_file()})
