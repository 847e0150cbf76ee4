"""Omega, the text space in which texts have neighbors (Sec. 3.2): training gensim's Doc2Vec, and a vector for any text.

gensim draws the start of an inference from Python's `hash` of the text, which differs from process to process, and the
rest from a state that every call moves on. `infer` takes both from the words and the seed: equal words have equal
vectors, wherever, whenever and in whatever order they are inferred. (Training needs no such care: since version 4
gensim draws all initial weights from the seed, and calls its `hashfxn` nowhere.)
"""

import functools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from gensim.models import Doc2Vec
from gensim.models.callbacks import CallbackAny2Vec
from gensim.models.doc2vec import train_document_dbow, train_document_dm
from gensim.models.keyedvectors import KeyedVectors

from config import Settings, UserError
from text import SPECIAL_WORDS, Tokenizer, load_tokenizer, read_vocabulary, to_indices

MAX_WORDS = 10_000
"""gensim reads no more words of a text, in training and in inference."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def text_batches(
    work: Path, split: str | None = None, size: int = 1000, table: str = "pairs.parquet"
) -> Iterator[list[str]]:
    """The texts of WORK's pair table or articles (of one split, or all), in their order, up to `size` at a time."""
    for batch in pq.ParquetFile(work / table).iter_batches(size, columns=["text", "split"]):
        rows = zip(batch["text"].to_pylist(), batch["split"].to_pylist(), strict=True)
        yield [text for text, of in rows if split in (None, of)]


# Training


def write_corpus(texts: Iterable[str], tokenizer: Tokenizer, path: Path) -> int:
    """Write the words of each text as a line for gensim to read, and return the number of lines.

    Texts without a word are left out: gensim's readers do not agree on the number of a line behind an empty one.
    Raises UserError where the file cannot be written.
    """
    lines = 0
    try:
        with path.open("w", encoding="utf-8") as corpus:
            for text in texts:
                if words := tokenizer.words(text)[:MAX_WORDS]:
                    corpus.write(" ".join(words) + "\n")
                    lines += 1
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}") from error
    return lines


class _EveryEpoch(CallbackAny2Vec):
    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def on_epoch_end(self, model: Doc2Vec) -> None:
        self.call()


def train(corpus: Path, settings: Settings, on_epoch: Callable[[], object] = lambda: None) -> Doc2Vec:
    """Train Omega on a file of one text a line (Sec. 3.3); `on_epoch` is called after every epoch.

    Vectors of the train texts are dropped: whatever reads a text's vector infers it, and they would make the model of
    3.3 million captions 2.6 GB larger. Raises UserError where no word is frequent enough.
    """
    # Several workers find that their shares of the file differ from what gensim expects, and say so every epoch.
    logging.getLogger("gensim").setLevel(logging.ERROR)
    chosen = settings.doc2vec
    model = Doc2Vec(
        vector_size=chosen.vector_size,
        dm=int(chosen.mode == "pv_dm"),
        dbow_words=int(chosen.dbow_words),
        hs=int(chosen.hierarchical_softmax),
        negative=chosen.negative,
        window=chosen.window,
        min_count=chosen.min_count,
        epochs=chosen.epochs,
        alpha=chosen.learning_rate,
        seed=settings.seed,
        workers=1 if settings.deterministic else cores(),
    )
    model.build_vocab(corpus_file=str(corpus), keep_raw_vocab=True)
    if not len(model.wv):
        raise UserError(
            f"no word of the train texts is seen doc2vec.min_count = {chosen.min_count} times, the most frequent "
            f"{max(model.raw_vocab.values(), default=0)} times; lower doc2vec.min_count"
        )
    model.raw_vocab.clear()
    model.workers = min(model.workers, model.corpus_count)  # a worker without a line of its own would repeat another's
    model.train(
        corpus_file=str(corpus),
        total_examples=model.corpus_count,
        total_words=model.corpus_total_words,
        epochs=model.epochs,
        callbacks=[_EveryEpoch(on_epoch)],
    )
    model.dv = KeyedVectors(model.vector_size)
    return model


def save_model(model: Doc2Vec, path: Path) -> None:
    """Save the model as one file, without what differs from run to run (gensim's log of events, with times)."""
    model.lifecycle_events, model.total_train_time = None, 0.0
    model.save(str(path), sep_limit=sys.maxsize)  # gensim would write large arrays to files of their own


def load_model(path: Path) -> Doc2Vec:
    """Load a saved model; raises UserError where it is missing or broken."""
    try:
        return Doc2Vec.load(str(path))
    except Exception as error:  # unpickling raises anything
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; run train_doc2vec.py again") from None


def start_word_vectors(model: Doc2Vec, seed: int) -> np.ndarray:
    """Word vectors (vocabulary, d) float32 for a text encoder to start from, aligned with `vocabulary.txt`.

    <pad> is zero; <start> and <end>, which Doc2Vec does not know, are drawn at the scale of the others.
    """
    learnt = model.wv.vectors
    special = np.random.default_rng(seed).normal(scale=learnt.std(), size=(len(SPECIAL_WORDS), learnt.shape[1]))
    special[0] = 0
    return np.concatenate([special, learnt]).astype(np.float32)


# Inference


def infer(model: Doc2Vec, words: list[str], epochs: int, seed: int) -> np.ndarray:
    """Omega(y): the vector (d,) float32 under which the words of a text are likeliest, by `epochs` steps (Sec. 3.2).

    As `model.infer_vector`, but a function of the words, the epochs and the seed alone. Words that the model does not
    know are passed over; without any that it knows the vector says nothing. Sets `model.random`.
    """
    start = zlib.crc32(f"{seed} {' '.join(words)}".encode())
    model.random = np.random.RandomState(start)
    vector = (np.random.default_rng(start).random((1, model.vector_size), dtype=np.float32) - 0.5) / model.vector_size
    update = train_document_dm if model.dm else train_document_dbow
    unlocked = np.ones(1, dtype=np.float32)
    for rate in np.linspace(model.alpha, model.min_alpha, epochs):
        update(
            model,
            words,
            [0],
            rate,
            learn_words=False,
            learn_hidden=False,
            doctag_vectors=vector,
            doctags_lockf=unlocked,
        )
    return vector[0]


class Embedded(NamedTuple):
    """A batch of B texts: their vectors (B, d) float32, numbers of words (B,) int64, and words (T,) int32, flat."""

    vectors: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray


@dataclass
class Omega:
    """All it takes to place a text: tokenizer, vocabulary and model, as step 1 left them in WORK."""

    settings: Settings
    tokenizer: Tokenizer
    vocabulary: dict[str, int]
    model: Doc2Vec

    @classmethod
    def load(cls, settings: Settings) -> "Omega":
        """Read step 1's outputs; raises UserError where one is missing or broken."""
        folder = settings.work_folder / "doc2vec"
        return cls(
            settings, load_tokenizer(settings), read_vocabulary(folder / "vocabulary.txt"), load_model(folder / "model")
        )

    def embed(self, texts: list[str]) -> Embedded:
        """Vectors and words of texts; zero and none for a text without a known word."""
        epochs = self.settings.doc2vec.inference_epochs or self.settings.doc2vec.epochs
        vectors = np.zeros((len(texts), self.model.vector_size), dtype=np.float32)
        sequences = []
        for row, text in enumerate(texts):
            words = [word for word in self.tokenizer.words(text) if word in self.vocabulary]
            if words:
                vectors[row] = infer(self.model, words, epochs, self.settings.seed)
            sequences.append(to_indices(words, self.vocabulary))
        return Embedded(
            vectors,
            np.array([len(sequence) for sequence in sequences], dtype=np.int64),
            np.array([number for sequence in sequences for number in sequence], dtype=np.int32),
        )


@functools.cache
def _omega_of(settings: bytes) -> Omega:
    return Omega.load(pickle.loads(settings))


def _embed(settings: bytes, texts: list[str]) -> Embedded:
    return _omega_of(settings).embed(texts)


def embed_batches(settings: Settings, batches: Iterable[list[str]], processes: int) -> Iterator[Embedded]:
    """`Omega.embed` of each batch, in order, in so many processes; the result does not depend on their number."""
    if processes == 1:
        yield from map(Omega.load(settings).embed, batches)
        return
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # this process answers Ctrl-C and ends the others
    with multiprocessing.get_context("spawn").Pool(processes, signal.signal, ignore_interrupt) as pool:
        yield from pool.imap(functools.partial(_embed, pickle.dumps(settings)), batches)
