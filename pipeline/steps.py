"""Steps and their stamps: what a step's outputs were made from, and whether that is still so.

A stamp (JSON) holds the settings that shaped a step's outputs, sizes and fingerprints of these and of its inputs, its
figures, the versions of the libraries and the wall time. It tells a step that its outputs are up to date. It tells the
next step that what it reads was made from the files that there are now.
"""

import contextlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import schema
from pipeline.errors import UserError
from pipeline.files import (
    as_written,
    fingerprint,
    flush_to_disk,
    is_damaged,
    is_whole,
    lock,
    read_json,
    temporary_files,
    write_json,
)
from pipeline.schema import Settings
from pipeline.settings import flatten, names_shaping, replaced, select
from pipeline.work import OUTPUTS, Work, space_folder

LIBRARIES = (
    "torch torchvision numpy gensim nmslib faiss-cpu nltk pyarrow pillow datasketch "
    "timm open_clip_torch sentence-transformers transformers"
).split()


@dataclass(frozen=True)
class Step:
    """One step of the pipeline: its files in WORK, and the settings that shape its outputs.

    In a name, `{space}` stands for the folder of `neighbors.space`, `{vectors}` and `{image_vectors}` for the files
    with that space's vectors, and `{training_texts}` for articles.parquet where Doc2Vec is trained on articles.
    """

    script: str
    stamp: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: tuple[str, ...]


def _step(script: str, folder: str, shape: str, *inputs: str) -> Step:
    stamp = f"{folder}{script.removesuffix('.py')}.json"
    return Step(script, stamp, inputs, OUTPUTS[script], names_shaping(shape))


WORDS = ("doc2vec/tokens.npy", "doc2vec/offsets.npy")
PREPARE = _step("prepare_dataset.py", "", schema.PREPARE)
TRAIN_DOC2VEC = _step("train_doc2vec.py", "doc2vec/", schema.DOC2VEC, "pairs.parquet", "{training_texts}")
EXTRACT_DOC2VEC = _step(
    "extract_doc2vec_vectors.py", "doc2vec/", schema.VECTORS, "pairs.parquet", *TRAIN_DOC2VEC.outputs
)
EXTRACT_IMAGES = _step("extract_image_features.py", "image_features/", schema.IMAGE_FEATURES, "pairs.parquet")
FIND_NEIGHBORS = _step(
    "knn_document_features.py",
    "neighbors/{space}/",
    schema.NEIGHBORS,
    *("pairs.parquet", "{vectors}", "{image_vectors}", *WORDS),
)
SIAMESE_LABELS = _step(
    "train_siamese_labels.py",
    "siamese/",
    schema.SIAMESE,
    *("pairs.parquet", "doc2vec/word_vectors.npy", *EXTRACT_DOC2VEC.outputs),
)
STEPS = (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC, EXTRACT_IMAGES, FIND_NEIGHBORS, SIAMESE_LABELS)

OMEGA_SPACES, IMAGE_SPACES = ("doc2vec", "both"), ("images", "both")
"""Values of `neighbors.space` that read step 2's vectors, and those of extract_image_features.py."""
WITH_ARTICLES = ("goodnews",)
"""Sources whose pairs come with articles."""


def _named(names: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    some = {
        "space": space_folder(settings.neighbors.space),
        "vectors": "doc2vec/vectors.npy" if settings.neighbors.space in OMEGA_SPACES else "",
        "image_vectors": "image_features/vectors.npy" if settings.neighbors.space in IMAGE_SPACES else "",
        "training_texts": "articles.parquet" if settings.doc2vec.train_on == "articles" else "",
    }
    without = () if settings.dataset.source in WITH_ARTICLES else ("articles.parquet",)
    return tuple(name for name in (name.format(**some) for name in names) if name and name not in without)


def stamp_path(step: Step, settings: Settings) -> Path:
    """The path of a step's stamp."""
    return settings.work_folder / _named((step.stamp,), settings)[0]


def output_paths(step: Step, settings: Settings) -> list[Path]:
    """The files that a step writes."""
    return [settings.work_folder / name for name in _named(step.outputs, settings)]


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def input_fingerprints(step: Step, settings: Settings) -> dict[str, str]:
    """Fingerprints of a step's inputs in WORK, by name. Raises UserError where one is missing."""
    found = {}
    for name in _named(step.inputs, settings):
        path = settings.work_folder / name
        if not path.is_file():
            raise UserError(f"{path} is not there; run {_producer(name, settings)} first")
        found[name] = fingerprint(path)
    return found


def _producer(name: str, settings: Settings) -> str:
    return next(step.script for step in STEPS if name in _named(step.outputs, settings))


def what_changed(step: Step, settings: Settings, published: Mapping[str, object] | None = None) -> str | None:
    """Why a step's outputs are not those of these settings and inputs; None where they are.

    `published` are fingerprints of inputs outside WORK. Where it is None, these are not compared.
    """
    try:
        stamp = read_json(stamp_path(step, settings))
    except UserError:
        return "is not there or not finished"
    if not isinstance(stamp, dict) or not {"outputs", "settings", "inputs", "published", "figures"} <= stamp.keys():
        return "has a broken stamp"
    for name, output in stamp["outputs"].items():
        path = settings.work_folder / name
        if not path.is_file():
            return f"is incomplete ({path.name})"
        if is_damaged(path, output):
            return f"is damaged ({path.name} has changed since it was written)"
    wanted = json.loads(json.dumps(select(settings, step.settings)))
    defaults = flatten(Settings())
    if stamp["settings"].get("dataset.new_splits"):  # its name until published_splits, which is its inverse
        stamp["settings"]["dataset.published_splits"] = False
    for name, value in wanted.items():
        made_with = stamp["settings"].get(name, defaults[name])  # settings added since then had their default
        if made_with != value:
            return f"was made with {name} {made_with}, and the settings now say {value}"
    for name, value in input_fingerprints(step, settings).items():
        if stamp["inputs"].get(name) != value:
            return f"was made from another {name}"
    if published is not None and stamp["published"] != published:
        names = sorted({name for name, _ in set(stamp["published"].items()) ^ set(published.items())})
        return f"was made from other published files ({names[0]})"
    return None


def is_up_to_date(step: Step, settings: Settings, published: Mapping[str, object] | None = None) -> bool:
    """Whether a step has nothing to do. Prints `up to date` for each output, or what has changed.

    A step that was killed while its outputs moved into place is finished first.
    """
    unfinished = _unfinished_folder(step, settings)
    if (unfinished / STAMP).is_file():
        with lock(settings.work_folder):
            _move_into_place(step, settings, unfinished)
    reason = what_changed(step, settings, published)
    if reason is None:
        if unfinished.parent.exists() or any(temporary_files(path) for path in output_paths(step, settings)):
            with contextlib.suppress(UserError), lock(settings.work_folder):  # another process may be at work there
                _tidy(step, settings, unfinished)
        for path in output_paths(step, settings):
            print(f"up to date {path}")
        return True
    if stamp_path(step, settings).exists():
        print(f"{stamp_path(step, settings).parent} {reason}: making it anew")
    return False


def require(step: Step, settings: Settings, published: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The stamp of an earlier step, whose outputs are about to be read. `published` is as for `what_changed`.

    Raises UserError, naming the step to run again, where the outputs are missing, were shaped by other settings, or
    were made from something that has changed since. The seed is not compared: it counts for the step itself.
    """
    stamp_file = stamp_path(step, settings)
    try:
        made = read_json(stamp_file)["settings"]
        as_made = replaced(settings, {name: made[name] for name in ("seed", "deterministic") if name in made})
    except (UserError, TypeError, KeyError):
        as_made = settings
    reason = what_changed(step, as_made, published)
    if reason is not None:
        what = output_paths(step, settings)[0]
        raise UserError(f"{what} {reason}; run {step.script} with these settings (again)")
    stamp: dict[str, Any] = read_json(stamp_file)
    return stamp


class StepFigures(dict[str, Any]):
    """A step's figures by name, and the folders in which it works."""

    def __init__(self, unfinished: Path) -> None:
        super().__init__()
        self.unfinished = unfinished
        """Kept when the step is stopped, until the step is done or is run with other settings or inputs."""
        self.new = Work(unfinished / NEW)
        """Outputs are written here. They move into WORK together when all of them are whole."""


RECORD, STAMP, NEW = "made_from.json", "stamp.json", "new"
"""In the folder of unfinished work: what it is made from, the stamp when all outputs are whole, the outputs."""


@contextlib.contextmanager
def making(step: Step, settings: Settings, published: Mapping[str, object] | None = None) -> Iterator[StepFigures]:
    """Surround the making of a step's outputs. Yields a dict for the step's figures; writes the stamp at the end.

    The old stamp is removed first, so that a step that is stopped counts as not done. The outputs in `figures.new` move
    into place in one transaction, which `is_up_to_date` completes after a kill. An output may also be in place already.
    """
    with lock(settings.work_folder):
        inputs = input_fingerprints(step, settings)
        stamp_path(step, settings).unlink(missing_ok=True)
        started = time.monotonic()
        read = {"inputs": inputs, "published": published or {}}
        figures = StepFigures(_begin(step, settings, read))
        yield figures
        new = {name: figures.new.folder / name for name in _named(step.outputs, settings)}
        whole = {name: path if path.exists() else settings.work_folder / name for name, path in new.items()}
        for path in whole.values():
            flush_to_disk(path)
        stamp = {
            "script": step.script,
            "settings": select(settings, step.settings),
            **read,
            "outputs": as_written(whole),
            "figures": figures,
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 2),
        }
        write_json(figures.unfinished / STAMP, stamp)
        _move_into_place(step, settings, figures.unfinished)
        for output in output_paths(step, settings):
            print(f"wrote {output}")


def _unfinished_folder(step: Step, settings: Settings) -> Path:
    name = _named((step.stamp,), settings)[0].replace("/", "-").removesuffix(".json")
    return Work(settings.work_folder).unfinished(name)


def _begin(step: Step, settings: Settings, read: dict[str, Any]) -> Path:
    """The folder for a step's unfinished work. What is in it is kept where it is of the same settings and inputs."""
    folder = _unfinished_folder(step, settings)
    made_from = json.loads(json.dumps({"settings": select(settings, step.settings), **read, "versions": versions()}))
    record = folder / RECORD
    if is_whole(record, made_from, ()):
        print(f"resuming {step.script} where it was stopped")
        (folder / STAMP).unlink(missing_ok=True)
    else:
        _remove(folder)
        write_json(record, made_from)
    return folder


def _move_into_place(step: Step, settings: Settings, unfinished: Path) -> None:
    """Move the outputs that a finished step has not moved yet, and its stamp last."""
    stamp = unfinished / STAMP
    try:
        names = read_json(stamp)["outputs"]
    except UserError:  # another process may have moved it; a damaged one does not count
        stamp.unlink(missing_ok=True)
        names = []
    for name in names:
        new, path = unfinished / NEW / name, settings.work_folder / name
        if new.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new.replace(path)
    if stamp.is_file():
        stamp.replace(stamp_path(step, settings))
    _tidy(step, settings, unfinished)


def _tidy(step: Step, settings: Settings, unfinished: Path) -> None:
    """Remove what a finished step has left of its work."""
    _remove(unfinished)
    with contextlib.suppress(OSError):  # not there, or another step is unfinished too
        unfinished.parent.rmdir()
    for path in output_paths(step, settings):
        for temporary in temporary_files(path):
            temporary.unlink(missing_ok=True)


def _remove(unfinished: Path) -> None:
    """Remove unfinished work. Its record goes first: what is left after a kill is not resumed."""
    (unfinished / RECORD).unlink(missing_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)
