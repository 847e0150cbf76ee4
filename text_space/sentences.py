"""Sentence encoders of the library sentence-transformers: their files, and their vectors of texts.

A text is read without its markup and in one line, all of it, up to the encoder's own number of tokens. Nothing of the
project's vocabulary, stop words or `text.max_sentences` applies.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.errors import UserError, reason
from pipeline.files import fingerprint, lock, open_array, read_array, read_json, remove_notes, write_json, written_whole
from pipeline.progress import ProgressBar

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TEXTS_AT_A_TIME = 2000
"""Distinct texts that are encoded before they count as done."""
OTHER_FORMATS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.gguf"]
"""Files of a published encoder that torch does not read."""
OF_AN_ENCODER = {".json", ".txt", ".safetensors", ".bin", ".model"}
"""Files that decide the vectors of an encoder."""


def encoder_folder(name: str, setting: str) -> Path:
    """The folder of a sentence encoder: `name` itself, or a published one's, downloaded where it is not here yet.

    Raises UserError, naming `setting`, where there is no such encoder.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "modules.json").is_file():
            raise UserError(f"{setting}: {folder} is no folder of a sentence encoder: it has no modules.json")
        return folder
    _demand_library(name, setting)
    import huggingface_hub

    published = name if "/" in name else f"sentence-transformers/{name}"
    try:
        try:
            found = huggingface_hub.snapshot_download(published, ignore_patterns=OTHER_FORMATS, local_files_only=True)
        except Exception:  # it is not here yet, or not all of it
            found = huggingface_hub.snapshot_download(published, ignore_patterns=OTHER_FORMATS)
    except Exception as error:  # no connection, no such name, no such folder: the hub raises many kinds
        raise UserError(
            f"{setting}: {name} is no folder, and no encoder of that name can be downloaded ({reason(error, 160)}); "
            "give a folder that SentenceTransformer.save has written"
        ) from None
    return Path(found)


def _demand_library(name: str, setting: str) -> None:
    try:
        import sentence_transformers  # noqa: F401  # takes seconds, and only those wait who want it
    except ImportError as error:
        raise UserError(
            f"{setting} {name} needs the package {error.name}; install it with pip install -r requirements-encoders.txt"
        ) from None


def encoder_fingerprint(folder: Path) -> str:
    """A digest of the files that decide an encoder's vectors."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in OF_AN_ENCODER and path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()}\0{fingerprint(path)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def load_encoder(folder: Path) -> "SentenceTransformer":
    """The encoder in a folder, in eval mode, on the CPU; callers share it.

    Raises UserError where it cannot be loaded, or sentence-transformers is not installed.
    """
    _demand_library(folder.name, "sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return SentenceTransformer(
            str(folder.absolute()), device="cpu", trust_remote_code=False, local_files_only=True
        ).eval()
    except Exception as error:  # a broken folder makes it raise anything
        raise UserError(f"cannot load the sentence encoder in {folder}: {reason(error, 160)}") from None


def as_read(text: str) -> str:
    """A text as a sentence encoder gets it."""
    from text_space.tokenizer import strip_markup  # it needs a package that training on words can do without

    return " ".join(strip_markup(text).split())


@torch.no_grad()
def encode(encoder: "SentenceTransformer", texts: Sequence[str]) -> np.ndarray:
    """Vectors (n, F), float32, of texts as they are read."""
    vectors: np.ndarray = encoder.encode(list(texts), batch_size=64, show_progress_bar=False)
    return vectors.astype(np.float32, copy=False).reshape(len(texts), -1)


def prompted(encoder: "SentenceTransformer", texts: Sequence[str]) -> list[str]:
    """Texts behind the encoder's default prompt, as `encode` puts it there."""
    prompt = encoder.prompts.get(encoder.default_prompt_name or "") or ""
    return [prompt + text for text in texts]


def token_numbers(encoder: "SentenceTransformer", texts: Sequence[str]) -> list[list[int]]:
    """The encoder's own tokens of texts as they are read. Raises UserError where it has no such tokenizer."""
    try:
        options: dict[str, Any] = {"truncation": True, "max_length": encoder.max_seq_length}
        numbers: list[list[int]] = encoder.tokenizer(prompted(encoder, texts), **options)["input_ids"]
    except (TypeError, AttributeError, KeyError, ValueError):
        raise UserError(
            "model.text.trainable is true, and this sentence encoder has no tokens that could be fine-tuned; set it to "
            "false"
        ) from None
    return numbers


def cached_vectors(folder: Path, texts: Sequence[str], parent: Path, device: torch.device) -> np.ndarray:
    """Vectors (N, F), float32, memory-mapped, of N texts by the encoder in `folder`; equal texts have equal rows.

    They are computed once, into a folder in `parent` that is named by the encoder, its files and the texts. A stopped
    call resumes.
    """
    read = [as_read(text) for text in texts]
    numbers: dict[str, int] = {}
    of_text = np.array([numbers.setdefault(text, len(numbers)) for text in read], dtype=np.int64)
    made_from = [encoder_fingerprint(folder), *read]
    digest = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:12]
    cache = parent / f"sentences-{folder.name}-{digest}"
    path = cache / "vectors.npy"
    if not path.is_file():
        with lock(cache, wait=True):
            if not path.is_file():  # another run may have finished it meanwhile
                distinct = _encode_all(cache, load_encoder(folder).to(device), list(numbers))
                with written_whole(path) as temporary_path:
                    whole = open_array(temporary_path, (len(read), distinct.shape[1]), np.float32)
                    for start in range(0, len(read), 100_000):
                        whole[start : start + 100_000] = distinct[of_text[start : start + 100_000]]
                    whole.flush()
                print(f"wrote {path}")
    remove_notes(cache / "distinct.npy", cache / "done.json")
    return read_array(path)


def _encode_all(cache: Path, encoder: "SentenceTransformer", texts: list[str]) -> np.ndarray:
    """Vectors (U, F) of distinct texts, in a file of `cache` that a stopped call resumes with."""
    done_file = cache / "done.json"
    done = read_json(done_file) if done_file.is_file() else 0
    size = encode(encoder, ["size"]).shape[1]
    vectors = open_array(cache / "distinct.npy", (len(texts), size), np.float32, keep=done > 0)
    with ProgressBar(total=len(texts), initial=done, desc="vectors of texts", unit="text") as progress:
        for start in range(done, len(texts), TEXTS_AT_A_TIME):
            some = texts[start : start + TEXTS_AT_A_TIME]
            vectors[start : start + len(some)] = encode(encoder, some)
            vectors.flush()
            write_json(done_file, start + len(some))
            progress.update(len(some))
    return vectors
