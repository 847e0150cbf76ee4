"""A trained run as an encoder of any texts and images.

    from training.encoder import RunEncoder
    encoder = RunEncoder("work/openclipart/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0")
    vectors, problems = encoder.texts(["a red rose", "a wolf howls at the moon"])

Texts and images are prepared as in training. `encode.py` does the same from a shell.
"""

import functools
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from datasets import TextInputs, WordSequences
from images.backbones import build_backbone, is_given
from images.files import UnreadableImage
from images.loading import ImageFiles, PixelSource
from images.networks import input_of
from models import seeded
from pipeline.devices import choose_device, use_precision
from pipeline.errors import UserError
from pipeline.files import demand_undamaged, fingerprint, read_json
from pipeline.pairs import Images
from pipeline.schema import Settings
from pipeline.settings import mistakes, replaced
from pipeline.steps import EXTRACT_DOC2VEC, require, stamp_path
from pipeline.work import Work
from text_space.tokenizer import Tokenizer, read_vocabulary, to_indices
from training.embedding import embed_texts, encode_images
from training.expansion import Expander
from training.image_sources import image_source
from training.portable import FOLDER, WEIGHTS, load_exported, read_record, unpacked, word_vectors_of
from training.runs import encoder_inputs, load_model, read_run
from training.text_streams import load_pairs

if TYPE_CHECKING:
    from text_space.doc2vec import Omega

Device = Literal["auto", "cpu", "cuda"]

WORDS_OF_WORK = ("doc2vec/vocabulary.txt", "doc2vec/punkt.json")
MODEL_INPUTS = ("pairs.parquet", "doc2vec/word_vectors.npy", "doc2vec/tokens.npy", "doc2vec/offsets.npy")
"""Files in WORK that define the pair numbers and the word numbers of a run."""


def demand_work(run: Path, settings: Settings) -> None:
    """Raise UserError where WORK is missing, or has other pairs or another vocabulary than in training."""
    if run.is_file():
        raise UserError(f"{run} is an exported run: it can encode (encode.py) and not search; name a run in WORK")
    if not (settings.work_folder / "pairs.parquet").is_file():
        raise UserError(
            f"{settings.work_folder / 'pairs.parquet'} is not there: a run without its WORK can encode (encode.py) and "
            "not search; put the run into WORK/runs"
        )
    inputs = read_json(run / "inputs.json")
    expected = {name: inputs[name] for name in MODEL_INPUTS}
    expected |= {name: read_json(stamp_path(EXTRACT_DOC2VEC, settings))["inputs"][name] for name in WORDS_OF_WORK}
    for name, value in expected.items():
        path = settings.work_folder / name
        if not path.is_file():
            raise UserError(f"{path} is not there, and {run} was trained on it; put it back, or run the steps again")
        demand_undamaged(path)
        if fingerprint(path) != value:
            raise UserError(f"{run} was trained on another {name}; train it again with --overwrite")


def demand_encoders(run: Path, settings: Settings) -> None:
    """Raise UserError where a file with an encoder's weights or vectors is missing, or another than in training."""
    inputs = read_json(run / "inputs.json")
    for name, value in encoder_inputs(settings.model).items():
        if inputs.get(name, value) != value:
            raise UserError(f"{run} was trained on another {name}; put that back, or train it again with --overwrite")


def demand_train_pairs(run: Path, settings: Settings) -> None:
    """Raise UserError where `evaluation.expand` has no train pairs for neighbors, or others than in training."""
    if run.is_file() or not (settings.work_folder / "pairs.parquet").is_file():
        raise UserError(
            f"evaluation.expand {settings.evaluation.expand:g} needs the train pairs in WORK, and {run} is "
            f"{'an exported run' if run.is_file() else 'not in its WORK'}; take --expand 0, or name a run in WORK"
        )
    demand_work(run, settings)
    require(EXTRACT_DOC2VEC, settings)


class RunEncoder:
    """The model of a finished run's best epoch, and its tokenizer.

    Args:
        run: the run's folder, WORK/runs/NAME or a copy of it anywhere, or a file of export_run.py.
        device: `auto`, `cpu` or `cuda`.
        expand: `evaluation.expand` in place of the run's.

    Raises:
        UserError: the run is unfinished or damaged, other weights of the backbone, no such device, no train pairs to
            expand with.
    """

    def __init__(self, run: Path | str, device: Device = "auto", expand: float | None = None) -> None:
        self.run = Path(run)
        self.device = choose_device(device)
        with unpacked(self.run) as folder:
            self.settings, _ = read_run(folder)
            if not (folder / "run.json").exists():
                raise UserError(f"{run} is unfinished; resume it with train_cross_modal_retrieval_model.py --resume")
            if expand is not None:
                self.settings = replaced(self.settings, {"evaluation.expand": expand})
                if wrong := mistakes(self.settings):
                    raise UserError("; ".join(wrong))
            if self.settings.evaluation.expand:
                demand_train_pairs(self.run, self.settings)
            self.settings.training.device = device
            use_precision(self.settings.training.precision)
            self._load(folder)
        self.new_inputs = getattr(type(self.model.texts), "new_inputs", None)
        """Gives what a text encoder reads that reads no words of the vocabulary; None for those that do."""
        self._inferring = threading.Lock()  # the search page has threads, and inference sets the state of the model
        self._batches = (self.settings.evaluation.batch_size, self.settings.training.precision, self.device)
        model = self.settings.model
        several = (model.pvse.embeddings,) if model.pvse.embeddings else ()
        self.shape: tuple[int, ...] = (*several, model.dimensions)
        """Shape of one embedding: (D,), or (K, D) with PVSE."""

    def _load(self, folder: Path) -> None:
        """Load model, tokenizer and vocabulary: from the run's folder, or, of a run that has none of its own, WORK."""
        settings, seed = self.settings.model, self.settings.seed
        words = folder / FOLDER
        if not words.is_dir():  # a run of an earlier version
            demand_work(folder, self.settings)
            words = Work(self.settings.work_folder).vocabulary.parent
            demand_encoders(folder, self.settings)
            self.model = load_model(folder, settings, seed, self.device)
        else:
            record = read_record(folder)
            vectors = word_vectors_of(folder, record)
            if (folder / WEIGHTS).is_file():
                self.model = load_exported(folder, self.settings, vectors, self.device)
            else:
                if not Path(settings.image.weights).is_file():
                    settings.image.weights = record["weights"]
                demand_encoders(folder, self.settings)
                self.model = load_model(folder, settings, seed, self.device, vectors)
        punkt = read_json(words / "punkt.json")
        self.tokenizer = Tokenizer(self.settings.text, self.settings.dataset.language, punkt)
        self.vocabulary = read_vocabulary(words / "vocabulary.txt")

    @functools.cached_property
    def expander(self) -> Expander | None:
        """What moves embeddings towards those of their neighbors; None where `evaluation.expand` is 0."""
        settings, device = self.settings, self.device
        if not settings.evaluation.expand:
            return None
        data = load_pairs(settings.work_folder, settings.features_folder, settings.model.text, device)
        source = image_source(settings, data, device, for_one_pass=True)
        return Expander(self.model, data, source, settings, device)

    @functools.cached_property
    def _omega(self) -> "Omega":
        try:
            from text_space.doc2vec import Omega
        except ImportError:
            raise UserError(
                "evaluation.expand looks up new texts in Omega with the package gensim; install it with pip install -r "
                "requirements.txt, or take --expand 0"
            ) from None
        return Omega.load(self.settings)

    @functools.cached_property
    def _pretrained(self) -> nn.Module:
        """The backbone before training, in eval mode."""
        image = self.settings.model.image
        if not image.trainable:
            return self.model.images.backbone
        with seeded(self.settings.seed):
            return build_backbone(image.backbone, image.weights).to(self.device).eval()

    def words(self, text: str) -> tuple[list[str], list[str]]:
        """The distinct words of `text`, in order: those in the vocabulary, and the others."""
        words = list(dict.fromkeys(self.tokenizer.words(text)))
        known = [word for word in words if word in self.vocabulary]
        return known, [word for word in words if word not in self.vocabulary]

    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Embeddings of N texts, and what is wrong with some of them.

        Returns:
            vectors: (N, D), or (N, K, D) with PVSE, float32 unit vectors. A text without a known word has a NaN row;
                for a sentence encoder one without a character.
            problems: the reason for each NaN row, by row number.
        """
        if self.new_inputs:
            inputs, problems = self.new_inputs(texts, self.settings.model.text, self.device)
            return self._embedded(inputs, texts, problems), problems
        words = [self.tokenizer.words(text) for text in texts]
        numbers = [to_indices(of_text, self.vocabulary) for of_text in words]
        lengths = np.array([len(of_text) for of_text in numbers], dtype=np.int64)
        sequences = WordSequences(
            tokens=np.fromiter((number for of_text in numbers for number in of_text), dtype=np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            max_words=self.settings.model.text.max_words,
        )
        unknown, no_word = "no word of it is in the vocabulary", "it has only stop words and short words"
        problems = {int(row): unknown if words[row] else no_word for row in np.flatnonzero(lengths == 0)}
        return self._embedded(sequences, texts, problems), problems

    def _embedded(self, inputs: TextInputs, texts: Sequence[str], problems: Collection[int]) -> np.ndarray:
        vectors = np.full((len(texts), *self.shape), np.nan, dtype=np.float32)
        usable = np.array([row for row in range(len(texts)) if row not in problems], dtype=np.int64)
        if len(usable):
            y = embed_texts(self.model.texts, inputs, usable, *self._batches)
            with self._inferring:
                if self.expander:
                    y = self.expander.new_texts(y, self._omega.embed([texts[row] for row in usable]).vectors)
            vectors[usable] = y.cpu().numpy()
        return vectors

    def images(
        self, paths: Sequence[Path | str], *, workers: int = 0, max_pixels: int | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Embeddings of N image files, and what is wrong with some of them.

        Args:
            paths: the files.
            workers: processes that decode the files; 0 decodes them in this one.
            max_pixels: larger images are not read. Default: the run's `dataset.max_pixels`.

        Returns:
            vectors: (N, D), or (N, K, D) with PVSE, float32 unit vectors. An unreadable image has a NaN row.
            problems: the reason for each NaN row, by row number.
        """
        vectors = np.full((len(paths), *self.shape), np.nan, dtype=np.float32)
        if not paths:
            return vectors, {}
        image = self.settings.model.image
        if is_given(image.backbone):
            why = f"model.image.backbone {image.backbone} has features of the dataset's images and of no others"
            return vectors, dict.fromkeys(range(len(paths)), why)
        limit = self.settings.dataset.max_pixels if max_pixels is None else max_pixels
        numbers = np.arange(len(paths))
        images = Images([str(path) for path in paths], numbers, Path())
        size, interpolation = input_of(image)
        files = ImageFiles(images, size, limit, _why_unreadable, interpolation)
        source = PixelSource(files, workers, self.device)
        encode = self._with_features if self.expander else self.model.images
        x = encode_images(encode, source, numbers, *self._batches)
        if self.expander:
            x, features = x.tensor_split([self.shape[-1]], dim=1)
            x = self.expander.new_images(x, features.cpu().numpy())
        vectors[:] = x.cpu().numpy()
        vectors[list(source.unreadable)] = np.nan
        return vectors, dict(sorted(source.unreadable.items()))

    def _with_features(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of images beside the pretrained backbone's features (B, F), in one tensor (B, D + F)."""
        features = self._pretrained(pixels)
        x = self.model.images(pixels if self.settings.model.image.trainable else features)
        return torch.cat([x, features.float()], dim=1)


def _why_unreadable(path: Path, error: UnreadableImage) -> str:
    """The reason without the path, which the caller knows. A missing file's message is its path."""
    return "there is no such file" if error.kind == "missing file" else str(error)
