"""Omega, the text space in which texts have neighbors (Sec. 3.2): training gensim's Doc2Vec, and a vector for any text.

gensim draws the start of an inference from Python's `hash` of the text, which differs from process to process, and the
rest from a state that every call moves on. `infer` takes both from the words and the seed: equal words have equal
vectors, wherever, whenever and in whatever order they are inferred. (Training needs no such care: since version 4
gensim draws all initial weights from the seed, and calls its `hashfxn` nowhere.)
"""

import contextlib
import functools
import itertools
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from gensim.models import Doc2Vec
from gensim.models.doc2vec import train_document_dbow, train_document_dm
from gensim.models.keyedvectors import KeyedVectors

from pipeline.errors import UserError
from pipeline.files import read_json, write_array, write_json, written_whole
from pipeline.processes import cores, in_order
from pipeline.schema import Settings
from text_space.tokenizer import SPECIAL_WORDS, Tokenizer, load_tokenizer, read_vocabulary, to_indices

MAX_WORDS = 10_000
"""gensim reads no more words of a text at a time: longer texts are trained on and inferred in parts of so many."""
TEXTS_AT_A_TIME = 10_000
"""Texts whose words are written before they are counted as done."""
SAVE_EVERY = 300.0
"""Seconds of training after which its state is kept; at 3.3 million texts that writes 2.6 GB."""


def text_batches(
    work: Path, split: str | None = None, size: int = 1000, table: str = "pairs.parquet", skip: int = 0
) -> Iterator[list[str]]:
    """The texts of WORK's pair table or articles (of one split, or all), in their order, up to `size` at a time.

    The first `skip` of them are left out.
    """
    for batch in pq.ParquetFile(work / table).iter_batches(size, columns=["text", "split"]):
        rows = zip(batch["text"].to_pylist(), batch["split"].to_pylist(), strict=True)
        texts = [text for text, of in rows if split in (None, of)]
        if len(texts) > skip:
            yield texts[skip:]
        skip = max(skip - len(texts), 0)


# Training


def write_corpus(texts: Iterable[str], tokenizer: Tokenizer, path: Path, resume: bool = False) -> int:
    """Write the words of each text as a line for gensim to read, and return the number of texts that have words.

    A text of more than MAX_WORDS words is several lines.
    Texts without a word are left out: gensim's readers do not agree on the number of a line behind an empty one.
    What is written is counted beside `path`; with `resume` a call goes on from the last count of one that was stopped.
    Raises UserError where the file cannot be written.
    """
    counts = path.with_suffix(".json")
    written = {"texts": 0, "texts_with_words": 0, "bytes": 0}
    try:
        if resume and counts.is_file():
            written = read_json(counts)
            os.truncate(path, written["bytes"])
        with path.open("ab" if written["texts"] else "wb") as corpus:
            rest = itertools.islice(texts, written["texts"], None)
            while some := list(itertools.islice(rest, TEXTS_AT_A_TIME)):
                of_texts = [words for text in some if (words := tokenizer.words(text))]
                lines = (" ".join(part) + "\n" for words in of_texts for part in parts(words))
                corpus.write("".join(lines).encode())
                corpus.flush()
                written = {
                    "texts": written["texts"] + len(some),
                    "texts_with_words": written["texts_with_words"] + len(of_texts),
                    "bytes": corpus.tell(),
                }
                write_json(counts, written)
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}") from error
    return written["texts_with_words"]


def parts(words: list[str]) -> list[list[str]]:
    """The words in parts that gensim reads to the end."""
    return [words[start : start + MAX_WORDS] for start in range(0, len(words), MAX_WORDS)]


def train(
    corpus: Path, settings: Settings, on_epoch: Callable[[], object] = lambda: None, unfinished: Path | None = None
) -> Doc2Vec:
    """Train Omega on a file of one text a line (Sec. 3.3); `on_epoch` is called after every epoch.

    With the folder `unfinished`, the state of the training is kept in it every SAVE_EVERY seconds, and a training that
    was stopped goes on from there: on one worker to the same model as if it had never stopped.
    Vectors of the train texts are dropped: whatever reads a text's vector infers it, and they would make the model of
    3.3 million captions 2.6 GB larger. Raises UserError where no word is frequent enough.
    """
    # Several workers find that their shares of the file differ from what gensim expects, and say so every epoch.
    logging.getLogger("gensim").setLevel(logging.ERROR)
    chosen = settings.doc2vec
    first = epochs_kept(unfinished) if unfinished else 0
    model = _kept(unfinished, first) if unfinished and first else untrained(corpus, settings)
    for _ in range(first):
        on_epoch()
    rates, saved = np.linspace(chosen.learning_rate, model.min_alpha, chosen.epochs + 1), time.monotonic()
    last_rate = model.min_alpha
    for epoch in range(first, chosen.epochs):
        # An epoch a call, for between two of them the training can be kept. The rate falls as in a single call.
        with _ended_by_a_failed_thread():
            model.train(
                corpus_file=str(corpus),
                total_examples=model.corpus_count,
                total_words=model.corpus_total_words,
                epochs=1,
                start_alpha=float(rates[epoch]),
                end_alpha=float(rates[epoch + 1]),
            )
        model.alpha, model.min_alpha, model.epochs = chosen.learning_rate, last_rate, chosen.epochs
        if unfinished and epoch + 1 < chosen.epochs and time.monotonic() - saved >= SAVE_EVERY:
            _keep(model, epoch + 1, unfinished)
            saved = time.monotonic()
        on_epoch()
    model.dv = KeyedVectors(model.vector_size)
    return model


@contextlib.contextmanager
def _ended_by_a_failed_thread() -> Iterator[None]:
    """Raise UserError where a thread fails. gensim would wait for ever for the thread's last message."""
    failed: list[object] = []

    def note(failure: threading.ExceptHookArgs) -> None:
        failed.append(failure.exc_value or failure.exc_type.__name__)
        if len(failed) == 1:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    usual, threading.excepthook = threading.excepthook, note
    try:
        yield
    except KeyboardInterrupt:
        if failed:
            raise UserError(f"Doc2Vec cannot be trained: {failed[0]}; run train_doc2vec.py again") from None
        raise
    finally:
        threading.excepthook = usual


def _keep(model: Doc2Vec, epoch: int, folder: Path) -> None:
    """Keep a model that is trained for `epoch` epochs: the vectors of its texts apart, for they are large."""
    vectors, model.dv.vectors = model.dv.vectors, np.empty((0, model.vector_size), np.float32)
    try:
        write_array(folder / f"epoch-{epoch}.npy", vectors)
        with written_whole(folder / f"epoch-{epoch}.model") as beside:
            model.save(str(beside), sep_limit=sys.maxsize)
    finally:
        model.dv.vectors = vectors
    write_json(folder / "epoch.json", epoch)
    for path in folder.glob("epoch-*"):
        if path.stem != f"epoch-{epoch}":
            path.unlink()


def epochs_kept(folder: Path) -> int:
    """The epochs for which the model kept in `folder` is trained, 0 where none is kept."""
    return read_json(folder / "epoch.json") if (folder / "epoch.json").is_file() else 0


def _kept(folder: Path, epoch: int) -> Doc2Vec:
    """The model that `_keep` kept in `folder`."""
    model = load_model(folder / f"epoch-{epoch}.model")
    model.dv.vectors = np.load(folder / f"epoch-{epoch}.npy", allow_pickle=False)
    return model


def untrained(corpus: Path, settings: Settings) -> Doc2Vec:
    """A model that knows its vocabulary; raises UserError where that is empty."""
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
    return model


def save_model(model: Doc2Vec, path: Path) -> None:
    """Save the model as one file, without what differs from run to run (gensim's log of events, with times)."""
    model.lifecycle_events, model.total_train_time = None, 0.0
    # A model that was kept and loaded on the way is to give the same file as one that was not. So gensim's notes of how
    # it loads go, attributes are written by name, and what pickle writes once where it is one object (strings, the type
    # of the arrays' numbers) is made alike.
    model.dv.vectors = model.wv.vectors[:0]
    model = pickle.loads(pickle.dumps(model))
    for part in (model, model.wv, model.dv):
        attributes = sorted(vars(part).items())
        vars(part).clear()
        vars(part).update({name: value for name, value in attributes if not name.startswith("__")})
    model.save(str(path), sep_limit=sys.maxsize)  # gensim would write large arrays to files of their own


def load_model(path: Path, mapped: bool = False) -> Doc2Vec:
    """Load a saved model; raises UserError where it is missing or broken.

    `mapped` is for a model that `share_model` wrote: its arrays are read-only and stay in their files.
    """
    try:
        return Doc2Vec.load(str(path), mmap="r" if mapped else None)
    except Exception as error:  # unpickling raises anything
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())}; remove it and run train_doc2vec.py again"
        ) from None


def share_model(path: Path, folder: Path) -> Path:
    """A copy in `folder` of the model saved as `path`, its arrays in files that several processes can map as one.

    Raises UserError where it cannot be read or written.
    """
    shared = folder / "model"
    try:
        load_model(path).save(str(shared), sep_limit=1)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return shared


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
    # gensim would allocate these itself, and free them before it writes to them: from 256 dimensions on that crashes.
    scratch = {name: np.zeros(model.layer1_size, np.float32) for name in (("work", "neu1") if model.dm else ("work",))}
    for rate, part in itertools.product(np.linspace(model.alpha, model.min_alpha, epochs), parts(words)):
        update(
            model,
            part,
            [0],
            rate,
            learn_words=False,
            learn_hidden=False,
            doctag_vectors=vector,
            doctags_lockf=unlocked,
            **scratch,
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
    def load(cls, settings: Settings, shared: Path | None = None) -> "Omega":
        """Read step 1's outputs, the model from where `share_model` put it if it did.

        Raises UserError where one is missing or broken.
        """
        folder = settings.work_folder / "doc2vec"
        model = load_model(shared, mapped=True) if shared else load_model(folder / "model")
        return cls(settings, load_tokenizer(settings), read_vocabulary(folder / "vocabulary.txt"), model)

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
def _omega_of(settings: bytes, shared: Path) -> Omega:
    return Omega.load(pickle.loads(settings), shared)


def _embed(settings: bytes, shared: Path, texts: list[str]) -> Embedded:
    return _omega_of(settings, shared).embed(texts)


def embed_batches(
    settings: Settings, batches: Iterable[list[str]], processes: int, folder: Path | None = None
) -> Iterator[Embedded]:
    """`Omega.embed` of each batch, in order, in so many processes; the result does not depend on their number.

    Several processes share one copy of the model's arrays, in files that they map; these lie in `folder` (by default
    the system's for temporary files) and go at the end.
    """
    if processes == 1:
        yield from map(Omega.load(settings).embed, batches)
        return
    with tempfile.TemporaryDirectory(prefix="doc2vec-", dir=folder) as files:
        shared = share_model(settings.work_folder / "doc2vec" / "model", Path(files))
        yield from in_order(functools.partial(_embed, pickle.dumps(settings), shared), batches, processes)
