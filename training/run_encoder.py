"""A trained run as an encoder of anybody's texts and images, for an index of one's own:

    from run_encoder import RunEncoder
    encoder = RunEncoder("work/openclipart/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0")
    vectors, problems = encoder.texts(["a red rose", "a wolf howls at the moon"])

Texts become words and images pixels as they did in training. `encode.py` does the same from a shell.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import WordSequences
from images.files import UnreadableImage, load_image
from pipeline.errors import UserError
from pipeline.files import fingerprint, read_json
from pipeline.settings import Settings
from pipeline.steps import EXTRACT_DOC2VEC, stamp_path
from text_space.tokenizer import load_tokenizer, read_vocabulary, to_indices
from training.embedding import autocast, embed_texts
from training.runs import choose_device, load_model, read_run

TRAINED_ON = ("pairs.parquet", "doc2vec/word_vectors.npy", "doc2vec/tokens.npy", "doc2vec/offsets.npy")
"""What a run's pair numbers and word numbers mean."""


def settings_of(run: Path, device: str = "auto") -> Settings:
    """The settings of a finished run, its WORK the folder that it lies in now, and `training.device` that of the call.

    Raises UserError where it is no finished run, or the pairs or the vocabulary there are not those it was trained on.
    """
    settings, _ = read_run(run)
    if not (run / "run.json").exists():
        raise UserError(f"{run} is unfinished; go on with it with train_cross_modal_retrieval_model.py --resume")
    settings.work = os.path.relpath(Path(os.path.abspath(run)).parents[1])
    settings.training.device = device
    vocabulary = ("doc2vec/vocabulary.txt", "doc2vec/punkt.json")
    trained_on = {name: read_json(run / "inputs.json")[name] for name in TRAINED_ON}
    trained_on |= {name: read_json(stamp_path(EXTRACT_DOC2VEC, settings))["inputs"][name] for name in vocabulary}
    paths = {name: settings.work_folder / name for name in trained_on}
    weights = "file model.image.weights"
    if value := read_json(run / "inputs.json").get(weights):
        trained_on[weights], paths[weights] = value, Path(settings.model.image.weights)
    for name, value in trained_on.items():
        path = paths[name]
        if not path.is_file():
            raise UserError(f"{path} is not there, and {run} was trained on it; put it back, or run the steps again")
        if fingerprint(path) != value:
            raise UserError(f"{run} was trained on another {name}; train it anew with --overwrite")
    return settings


class RunEncoder:
    """The model of a finished run with the lowest validation loss, and what its texts pass through before it.

    Args:
        run: the run's folder, WORK/runs/NAME.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        UserError: as `settings_of`; no such device.
    """

    def __init__(self, run: Path | str, device: str = "auto") -> None:
        self.run = Path(run)
        self.settings = settings_of(self.run, device)
        self.device = choose_device(self.settings)
        self.model = load_model(self.run, self.settings, self.device)
        self.tokenizer = load_tokenizer(self.settings)
        self.vocabulary = read_vocabulary(self.settings.work_folder / "doc2vec" / "vocabulary.txt")
        model = self.settings.model
        several = (model.pvse.embeddings,) if model.pvse.embeddings else ()
        self.shape: tuple[int, ...] = (*several, model.dimensions)
        """Of one embedding: (D,), or (K, D) of PVSE."""

    def words(self, text: str) -> tuple[list[str], list[str]]:
        """The words of `text` that are in the vocabulary, and those that are not, each in order and once."""
        words = list(dict.fromkeys(self.tokenizer.words(text)))
        known = [word for word in words if word in self.vocabulary]
        return known, [word for word in words if word not in self.vocabulary]

    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Embeddings (N, D), or (N, K, D) of PVSE, float32 unit vectors; by position, what is wrong with some texts.

        The rows of texts without a known word, which are these, are NaN.
        """
        words = [self.tokenizer.words(text) for text in texts]
        numbers = [to_indices(of_text, self.vocabulary) for of_text in words]
        lengths = np.array([len(of_text) for of_text in numbers], dtype=np.int64)
        tokens = np.fromiter((number for of_text in numbers for number in of_text), dtype=np.int32)
        sequences = WordSequences(
            tokens=tokens,
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            max_words=self.settings.model.text.max_words,
        )
        vectors = np.full((len(texts), *self.shape), np.nan, dtype=np.float32)
        if len(usable := np.flatnonzero(lengths)):
            vectors[usable] = embed_texts(self.model, sequences, usable, self.settings, self.device).cpu().numpy()
        problems = {
            int(row): "no word of it is in the vocabulary"
            if words[row]
            else "it has no word that counts (stop words and short words do not)"
            for row in np.flatnonzero(lengths == 0)
        }
        return vectors, problems

    @torch.no_grad()
    def images(
        self, paths: Sequence[Path | str], *, workers: int = 0, max_pixels: int | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Embeddings (N, D), or (N, K, D) of PVSE, float32 unit vectors; by position, what is wrong with some files.

        The rows of images that cannot be read, or have more pixels than `max_pixels` (by default the run's
        `dataset.max_pixels`), are NaN. `workers` processes decode the files; 0 decodes them in this one.
        """
        limit = self.settings.dataset.max_pixels if max_pixels is None else max_pixels
        loader = DataLoader(
            _Pictures(paths, self.settings.model.image.size, limit),
            batch_size=self.settings.evaluation.batch_size,
            collate_fn=list,
            num_workers=workers,
            generator=torch.Generator(),  # not torch's own, which may be in use
        )
        vectors = np.full((len(paths), *self.shape), np.nan, dtype=np.float32)
        problems: dict[int, str] = {}
        start = 0
        for batch in tqdm(loader, desc="images", unit="batch", leave=False, disable=None):
            read = [number for number, pixels in enumerate(batch) if isinstance(pixels, Tensor)]
            problems |= {start + number: why for number, why in enumerate(batch) if isinstance(why, str)}
            if read:
                pixels = torch.stack([batch[number] for number in read]).to(self.device)
                with autocast(self.settings, self.device):
                    vectors[start + np.array(read)] = self.model.images(pixels).cpu().numpy()
            start += len(batch)
        return vectors, problems


class _Pictures(Dataset[Tensor | str]):
    """Image files as (3, S, S) uint8 pixels, or what is wrong with them."""

    def __init__(self, paths: Sequence[Path | str], size: int, max_pixels: int) -> None:
        self.paths, self.size, self.max_pixels = [str(path) for path in paths], size, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            image = load_image(self.paths[number], size=self.size, max_pixels=self.max_pixels)
        except UnreadableImage as error:
            return "there is no such file" if error.kind == "missing file" else str(error)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
