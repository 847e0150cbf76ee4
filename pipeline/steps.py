"""What the steps leave on disk: whole files, and beside them a stamp that says what they were made from.

A stamp (JSON) holds the settings that shaped a step's outputs, the sizes of these, the fingerprints of its inputs, its
figures, the versions of the libraries and the wall time. With it a step sees that there is nothing to do, and the next
step sees that what it reads was made from what is there now.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import fingerprint, lock, read_json, write_json
from pipeline.settings import Settings, flatten, select

LIBRARIES = ("torch", "torchvision", "numpy", "gensim", "faiss-cpu", "nltk", "pyarrow", "pillow", "datasketch")


@dataclass(frozen=True)
class Step:
    """One step of the pipeline: its files in WORK and the settings that shape what it writes.

    `{space}` in a name stands for `neighbors.space`, `{vectors}` for the file with that space's vectors, `{articles}`
    for articles.parquet where the dataset has articles, `{training_texts}` for it where Doc2Vec is trained on them.
    """

    script: str
    stamp: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: tuple[str, ...]


PREPARE = Step(
    script="prepare_dataset.py",
    stamp="prepare_dataset.json",
    inputs=(),
    outputs=("pairs.parquet", "rejected.jsonl", "{articles}"),
    settings=("seed", "dataset"),
)
TRAIN_DOC2VEC = Step(
    script="train_doc2vec.py",
    stamp="doc2vec/train_doc2vec.json",
    inputs=("pairs.parquet", "{training_texts}"),
    outputs=("doc2vec/model", "doc2vec/vocabulary.txt", "doc2vec/word_vectors.npy", "doc2vec/punkt.json"),
    settings=("seed", "deterministic", "dataset.language", "text", "doc2vec"),
)
EXTRACT_DOC2VEC = Step(
    script="extract_doc2vec_vectors.py",
    stamp="doc2vec/extract_doc2vec_vectors.json",
    inputs=("pairs.parquet", *TRAIN_DOC2VEC.outputs),
    outputs=("doc2vec/vectors.npy", "doc2vec/tokens.npy", "doc2vec/offsets.npy"),
    settings=("seed", "dataset.language", "text", "doc2vec"),
)
EXTRACT_IMAGES = Step(
    script="extract_image_features.py",
    stamp="image_features/extract_image_features.json",
    inputs=("pairs.parquet",),
    outputs=("image_features/vectors.npy",),
    settings=("model.image.backbone", "model.image.weights", "model.image.size", "training.precision"),
)
FIND_NEIGHBORS = Step(
    script="knn_document_features.py",
    stamp="neighbors/{space}/knn_document_features.json",
    inputs=("pairs.parquet", "{vectors}", "doc2vec/tokens.npy", "doc2vec/offsets.npy"),
    outputs=("neighbors/{space}/rows.npy", "neighbors/{space}/indices.npy", "neighbors/{space}/distances.npy"),
    settings=(
        "seed",
        "deterministic",
        "neighbors.space",
        "neighbors.k",
        "neighbors.method",
        "neighbors.distance",
        "neighbors.min_recall",
        "neighbors.recall_sample",
        "neighbors.hnsw_m",
        "neighbors.hnsw_ef_construction",
    ),
)
SIAMESE_LABELS = Step(
    script="train_siamese_labels.py",
    stamp="siamese/train_siamese_labels.json",
    inputs=("pairs.parquet", "doc2vec/word_vectors.npy", *EXTRACT_DOC2VEC.outputs),
    outputs=("siamese/vectors.npy", "siamese/comparison.npy"),
    settings=(
        "seed",
        "deterministic",
        "siamese",
        "model.text.hidden_size",
        "model.text.word_vectors",
        "model.text.graph_neighbors",
        "model.text.graph_channels",
    ),
)

STEPS = (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC, EXTRACT_IMAGES, FIND_NEIGHBORS, SIAMESE_LABELS)


def remedy(path: Path) -> str:
    """How to get a broken file anew. It goes first: a step looks at the sizes of what it wrote, not at the content."""
    if path.parent.parent.name == "runs":
        again = (
            "run evaluate.py" if path.name in ("metrics.json", "evaluate.json") else "train the run with --overwrite"
        )
        return f"; remove it and {again} again"
    for step in STEPS:
        if any(path.match(name.replace("{space}", "*")) for name in (*step.outputs, step.stamp)):
            return f"; remove it and run {step.script} again"
    return ""


# Stamps


def _named(names: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    space = settings.neighbors.space
    vectors = {"doc2vec": "doc2vec/vectors.npy", "images": "image_features/vectors.npy"}[space]
    articles = "articles.parquet" if settings.dataset.source == "goodnews" else ""
    training_texts = "articles.parquet" if settings.doc2vec.train_on == "articles" else ""
    some = {"space": space, "vectors": vectors, "articles": articles, "training_texts": training_texts}
    return tuple(name for name in (name.format(**some) for name in names) if name)


def stamp_path(step: Step, settings: Settings) -> Path:
    """Where a step's stamp lies."""
    return settings.work_folder / _named((step.stamp,), settings)[0]


def output_paths(step: Step, settings: Settings) -> list[Path]:
    """The files that a step writes."""
    return [settings.work_folder / name for name in _named(step.outputs, settings)]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def input_fingerprints(step: Step, settings: Settings) -> dict[str, str]:
    """Fingerprint of each of a step's inputs in WORK, by name; raises UserError where one is missing."""
    found = {}
    for name in _named(step.inputs, settings):
        path = settings.work_folder / name
        if not path.is_file():
            raise UserError(f"{path} is not there; run {_producer(name, settings)} first")
        found[name] = fingerprint(path)
    return found


def _producer(name: str, settings: Settings) -> str:
    for step in STEPS:
        if name in _named(step.outputs, settings):
            return step.script
    raise KeyError(name)


def what_changed(step: Step, settings: Settings, published: Mapping[str, object] | None = None) -> str | None:
    """Why a step's outputs are not those of these settings and of the inputs there are now; None where they are.

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
        if not path.is_file() or path.stat().st_size != output["size"]:
            return f"is incomplete ({path.name})"
    wanted = json.loads(json.dumps(select(settings, step.settings)))
    defaults = flatten(Settings())
    for name, value in wanted.items():
        made_with = stamp["settings"].get(name, defaults[name])  # what was no setting then was as its default is
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
    """True, after saying so line by line, where a step has nothing to do. Says what changed where it has."""
    reason = what_changed(step, settings, published)
    if reason is None:
        for path in output_paths(step, settings):
            print(f"up to date {path}")
        return True
    if stamp_path(step, settings).exists():
        print(f"{stamp_path(step, settings).parent} {reason}: making it anew")
    return False


def require(step: Step, settings: Settings) -> dict[str, Any]:
    """The stamp of an earlier step, whose outputs are about to be read.

    Raises UserError, naming the step to run again, where they are missing, were shaped by other settings, or were made
    from something that has changed since. The seed is not compared: it shapes a step when that step is run.
    """
    stamp_file = stamp_path(step, settings)
    try:
        made = read_json(stamp_file)["settings"]
    except (UserError, TypeError, KeyError):
        made = {}
    as_made = dataclasses.replace(settings, **{name: made[name] for name in ("seed", "deterministic") if name in made})
    reason = what_changed(step, as_made)
    if reason is not None:
        what = output_paths(step, settings)[0]
        raise UserError(f"{what} {reason}; run {step.script} with these settings (again)")
    return read_json(stamp_file)


def _unfinished(step: Step, settings: Settings, read: dict[str, Any]) -> Path:
    """The folder for a step's unfinished work, with what is there of the same settings and inputs, else empty."""
    name = _named((step.stamp,), settings)[0].replace("/", "-").removesuffix(".json")
    folder = settings.work_folder / ".unfinished" / name
    made_from = json.loads(json.dumps({"settings": select(settings, step.settings), **read, "versions": versions()}))
    record = folder / "made_from.json"
    if record.is_file() and read_json(record) == made_from:
        print(f"going on where {step.script} was stopped")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(record, made_from)
    return folder


class Figures(dict[str, Any]):
    """A step's figures by name, and the folder in which it keeps what it has done so far."""

    def __init__(self, unfinished: Path) -> None:
        super().__init__()
        self.unfinished = unfinished
        """It outlives a step that is stopped, until that step is done, or is run with other settings or inputs."""


@contextlib.contextmanager
def making(step: Step, settings: Settings, published: Mapping[str, object] | None = None) -> Iterator[Figures]:
    """Surround the making of a step's outputs: yields a dict to put the step's figures into, and stamps at the end.

    The old stamp goes first, so that a step that was cut short counts as not done.
    """
    with lock(settings.work_folder):
        yield from _making(step, settings, published or {})


def _making(step: Step, settings: Settings, published: Mapping[str, object]) -> Iterator[Figures]:
    inputs = input_fingerprints(step, settings)
    path = stamp_path(step, settings)
    path.unlink(missing_ok=True)
    started = time.monotonic()
    figures = Figures(_unfinished(step, settings, {"inputs": inputs, "published": published}))
    yield figures
    outputs = {name: {"size": (settings.work_folder / name).stat().st_size} for name in _named(step.outputs, settings)}
    write_json(
        path,
        {
            "script": step.script,
            "settings": select(settings, step.settings),
            "inputs": inputs,
            "published": published,
            "outputs": outputs,
            "figures": figures,
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 2),
        },
    )
    shutil.rmtree(figures.unfinished)
    with contextlib.suppress(OSError):  # another step is unfinished too
        figures.unfinished.parent.rmdir()
    for output in output_paths(step, settings):
        print(f"wrote {output}")
