"""What a run needs to embed texts and images away from its WORK, in its folder and in one file to give away.

`RUN/encoder` holds copies of the vocabulary, of the sentence splitter's parameters and, for the graph encoder, of the
word vectors. An export is a zip file with these, the settings, all weights and a model card. Neither holds a pickle.
"""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import TwoStream, build_model
from pipeline.errors import UserError, reason
from pipeline.files import fingerprint, read_array, read_json, write_array, write_json, write_text, written_whole
from pipeline.schema import Settings
from pipeline.work import Work

FOLDER = "encoder"
NAMES = ("vocabulary.txt", "punkt.json", "word_vectors.npy")
RECORD = "encoder.json"
"""Fingerprints of these files, and what a run's settings say by a path that may depend on the working directory."""
WEIGHTS, CARD = "model.safetensors", "README.md"
EXPORTED = ("config.yaml", "run.json", WEIGHTS, CARD, *(f"{FOLDER}/{name}" for name in (*NAMES, RECORD)))


def keep_encoder_files(run: Path, settings: Settings) -> None:
    """Copy into a run's folder what its model needs beside its weights. Raises UserError where the disk is full."""
    work, folder = Work(settings.work_folder), run / FOLDER
    write_text(folder / "vocabulary.txt", work.vocabulary.read_text(encoding="utf-8"))
    write_json(folder / "punkt.json", read_json(work.punkt))
    vectors = read_array(work.word_vectors)
    if settings.model.text.encoder == "graph":
        write_array(folder / "word_vectors.npy", vectors)
    weights = settings.model.image.weights
    record = {
        "files": {name: fingerprint(folder / name) for name in NAMES if (folder / name).exists()},
        "word_vectors": vectors.shape,
        "weights": os.path.abspath(weights) if weights not in ("imagenet", "none") else weights,
    }
    write_json(folder / RECORD, record)


def read_record(run: Path) -> dict[str, Any]:
    """What `keep_encoder_files` noted. Raises UserError where a file has changed since, or is missing."""
    folder = run / FOLDER
    record: dict[str, Any] = read_json(folder / RECORD)
    for name, value in record["files"].items():
        if not (folder / name).is_file() or fingerprint(folder / name) != value:
            raise UserError(f"{folder / name} is missing or has changed; copy the run again, or train it again")
    return record


def word_vectors_of(run: Path, record: dict[str, Any]) -> np.ndarray:
    """The word vectors (V, E) that the model starts from. Only the graph encoder keeps them: others learn theirs."""
    kept = run / FOLDER / "word_vectors.npy"
    return read_array(kept) if "word_vectors.npy" in record["files"] else np.zeros(record["word_vectors"], np.float32)


# One file


def export_run(run: Path, model: TwoStream, out: Path) -> None:
    """Write a run as one zip file. `model` has its best weights. Raises UserError where it cannot be written."""
    from safetensors.torch import save

    # A frozen backbone and its normalisation are in it too, so that no weights have to be found or downloaded.
    state = model.state_dict() | dict(model.named_buffers())
    weights = save({name: value.detach().cpu().contiguous().clone() for name, value in state.items()})
    files = {name: (run / name).read_bytes() for name in EXPORTED if (run / name).is_file()}
    files |= {WEIGHTS: weights, CARD: model_card(run).encode()}
    with written_whole(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            # A fixed date: the same run gives the same file.
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)


@contextlib.contextmanager
def unpacked(run: Path) -> Iterator[Path]:
    """The folder of a run: itself, or that of an exported file, which exists until the end of the block.

    Raises UserError where the file is no export.
    """
    if not run.is_file():
        yield run
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(run) as archive:
                for name in EXPORTED:
                    with contextlib.suppress(KeyError):
                        archive.extract(name, folder)
        except Exception as error:  # a damaged archive raises anything: zlib.error, NotImplementedError
            raise UserError(
                f"{run} is no run: neither its folder nor a file of export_run.py ({reason(error, 200)})"
            ) from None
        yield Path(folder)


def load_exported(folder: Path, settings: Settings, vectors: np.ndarray, device: torch.device) -> TwoStream:
    """The model of an unpacked export, in eval mode. Raises UserError where its weights are broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    bare = settings.model.model_copy(update={"image": settings.model.image.model_copy(update={"weights": "none"})})
    model = build_model(bare, vectors, settings.seed)
    try:
        state = load_file(folder / WEIGHTS)
        buffers = {name: state.pop(name) for name in dict(model.named_buffers()) if name not in model.state_dict()}
        model.load_state_dict(state)
        for name, value in buffers.items():
            model.get_buffer(name).copy_(value)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{WEIGHTS} of the export does not fit its settings ({reason(error, 200)}); export the run again"
        ) from None
    return model.to(device).eval()


def model_card(run: Path) -> str:
    """What the exported model is, what it was trained on, what it scored, and how it is used."""
    from training.runs import read_run, readable_name

    settings, _ = read_run(run)
    evaluated = run / "metrics.json"
    evaluation = read_json(evaluated) if evaluated.is_file() else {"figures": {}}
    figures = evaluation["figures"]
    table = [f"| {name} | {figure['value']:.4f} | {figure['chance']:.4f} |" for name, figure in figures.items()]
    measured = (
        "\n".join(["| metric | value | by chance |", "| --- | ---: | ---: |", *table]) if table else "Not measured."
    )
    if "expand" in evaluation:
        weight = f"{evaluation['expand']:g}"
        measured = f"With evaluation.expand {weight}, which takes train pairs that are not in this file.\n\n{measured}"
    made = read_json(run / "run.json")
    return f"""# {readable_name(run)}

An image-text model after Thomas & Kovashka (ECCV 2020): images and texts that share a topic are near each other.

- Dataset: {settings.dataset.name or settings.dataset.source}, language {settings.dataset.language}.
- Image stream: {settings.model.image.backbone}, images resized to {settings.model.image.size} pixels.
- Text stream: {settings.model.text.encoder}.
- Embeddings: unit vectors of {settings.model.dimensions} dimensions; the cosine is the similarity.
- Trained for {made["epochs"]} epochs; the weights are of epoch {made["best_epoch"]}. All settings: config.yaml.
- Versions: {", ".join(f"{name} {version}" for name, version in made["versions"].items())}.

## Measured on its test split

{measured}

## Use

    python encode.py --run THIS_FILE --texts texts.txt --out texts.npy
    python encode.py --run THIS_FILE --images FOLDER --out images.npy

It knows the words in encoder/vocabulary.txt alone. A text without one of them has no embedding.
"""
