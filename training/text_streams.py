"""Text streams that read no words of the vocabulary: sentence encoders, and vectors that users bring.

Beside a text encoder's constructor and `forward` they have class methods for what they read in place of words:
`pair_inputs` of all pairs, `new_inputs` of other texts, and `fingerprint` of the file or the encoder.
"""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import Prepared, TextInputs, TextVectors, WordSequences, load_prepared
from images.backbones import xavier_
from pipeline import schema
from pipeline.files import fingerprint
from pipeline.given_arrays import read_given, vectors_of_texts
from pipeline.pairs import read_pairs
from pipeline.registry import TEXT_ENCODERS, argument
from text_space.sentences import (
    as_read,
    cached_vectors,
    encode,
    encoder_fingerprint,
    encoder_folder,
    load_encoder,
    token_numbers,
)

SETTING = "model.text.encoder"


class VectorEncoder(nn.Module):
    """Text stream f_T on vectors of texts: dropout, linear to D, L2 normalisation."""

    def __init__(self, size: int, settings: schema.TextEncoder, dimensions: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(settings.dropout)
        self.project = nn.Linear(size, dimensions)
        xavier_(self.project)

    def forward(self, texts: Tensor, lengths: Tensor) -> Tensor:
        """(B, F) vectors to (B, D) unit vectors, float32."""
        return F.normalize(self.project(self.dropout(texts)).float(), dim=1)


class GivenVectors(VectorEncoder):
    """The text stream on the vectors in a file. It knows the dataset's texts and no others."""

    def __init__(self, settings: schema.TextEncoder, word_vectors: np.ndarray, dimensions: int) -> None:
        array = read_given(Path(argument(settings.encoder)), SETTING)
        super().__init__(array.shape[1], settings, dimensions)

    @staticmethod
    def pair_inputs(
        texts: Sequence[str], settings: schema.TextEncoder, features: Path, device: torch.device
    ) -> TextInputs:
        """The vector of every pair's text. Raises UserError where the file does not have them all."""
        return TextVectors(vectors_of_texts(Path(argument(settings.encoder)), texts, SETTING))

    @staticmethod
    def new_inputs(
        texts: Sequence[str], settings: schema.TextEncoder, device: torch.device
    ) -> tuple[TextInputs, dict[int, str]]:
        """No inputs, and why not for each text."""
        why = f"{SETTING} {settings.encoder} has vectors of the dataset's texts and of no others"
        return TextVectors(np.zeros((len(texts), 1), dtype=np.float32)), dict.fromkeys(range(len(texts)), why)

    @staticmethod
    def fingerprint(settings: schema.TextEncoder) -> str:
        """A digest of the file. Raises UserError where it is not there."""
        path = Path(argument(settings.encoder))
        read_given(path, SETTING)
        return fingerprint(path)


class SentenceEncoder(VectorEncoder):
    """The text stream on a sentence encoder of sentence-transformers.

    Frozen, it reads the encoder's vectors, computed once. With `model.text.trainable` it holds the encoder, which reads
    its own tokens.
    """

    def __init__(self, settings: schema.TextEncoder, word_vectors: np.ndarray, dimensions: int) -> None:
        encoder = load_encoder(encoder_folder(argument(settings.encoder), SETTING))
        super().__init__(encode(encoder, ["size"]).shape[1], settings, dimensions)
        self.encoder: nn.Module | None = None
        if settings.trainable:
            self.encoder = copy.deepcopy(encoder)  # callers share the loaded one
            self.padding = int(getattr(encoder.tokenizer, "pad_token_id", None) or 0)
            for name, parameter in self.encoder.named_parameters():
                # BERT's pooler is in no sentence vector, and processes that share a batch wait for every gradient.
                parameter.requires_grad_(".pooler." not in name)

    def forward(self, texts: Tensor, lengths: Tensor) -> Tensor:
        """(B, F) vectors, or the encoder's tokens (B, L) and their (B,) lengths, to (B, D) unit vectors, float32."""
        if self.encoder is not None:
            mask = torch.arange(texts.shape[1], device=texts.device) < lengths.to(texts.device)[:, None]
            tokens = {"input_ids": texts.masked_fill(~mask, self.padding), "attention_mask": mask.long()}
            texts = self.encoder(tokens)["sentence_embedding"]
        return super().forward(texts, lengths)

    @staticmethod
    def pair_inputs(
        texts: Sequence[str], settings: schema.TextEncoder, features: Path, device: torch.device
    ) -> TextInputs:
        """Vectors of all pairs' texts, cached in the folder `features`; the encoder's tokens where it is fine-tuned."""
        folder = encoder_folder(argument(settings.encoder), SETTING)
        return (
            _tokens(folder, texts)
            if settings.trainable
            else TextVectors(cached_vectors(folder, texts, features, device))
        )

    @staticmethod
    def new_inputs(
        texts: Sequence[str], settings: schema.TextEncoder, device: torch.device
    ) -> tuple[TextInputs, dict[int, str]]:
        """The same for other texts, and what is wrong with those of no character, by their place."""
        folder = encoder_folder(argument(settings.encoder), SETTING)
        empty = {place: "it is empty" for place, text in enumerate(texts) if not as_read(text)}
        if settings.trainable:
            return _tokens(folder, texts), empty
        return TextVectors(encode(load_encoder(folder).to(device), [as_read(text) for text in texts])), empty

    @staticmethod
    def fingerprint(settings: schema.TextEncoder) -> str:
        """A digest of the encoder's files."""
        return encoder_fingerprint(encoder_folder(argument(settings.encoder), SETTING))


def _tokens(folder: Path, texts: Sequence[str]) -> WordSequences:
    """The encoder's own tokens of texts."""
    numbers = token_numbers(load_encoder(folder), [as_read(text) for text in texts])
    return WordSequences(
        tokens=np.fromiter(itertools.chain.from_iterable(numbers), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(of_text) for of_text in numbers])]).astype(np.int64),
    )


def load_pairs(work: Path, features: Path, settings: schema.TextEncoder, device: torch.device) -> Prepared:
    """The prepared files in WORK, with what the text encoder of `settings` reads in place of words.

    The vectors of a sentence encoder are cached in the folder `features`. Raises UserError as `load_prepared`, and
    where an encoder or a file cannot be read.
    """
    data = load_prepared(work, settings.max_words)
    if inputs := getattr(TEXT_ENCODERS.load(settings.encoder), "pair_inputs", None):
        data.inputs = inputs(read_pairs(work, ["text"])["text"].to_pylist(), settings, features, device)
    return data
