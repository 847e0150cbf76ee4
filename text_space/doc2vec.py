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
from types import FrameType
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from gensim.models import Doc2Vec
from gensim.models.doc2vec import train_document_dbow, train_document_dm
from gensim.models.keyedvectors import KeyedVectors

from pipeline import schema
from pipeline.errors import UserError
from pipeline.files import read_json, write_array, write_json, written_whole
from pipeline.processes import in_order
from pipeline.schema import Settings
from pipeline.work import Work
from text_space.tokenizer import SPECIAL_WORDS, Tokenizer, load_tokenizer, read_vocabulary, to_indices

MAX_WORDS = 10_000
"""Words that gensim reads at a time. Longer texts are trained on and inferred in parts."""
TEXTS_AT_A_TIME = 10_000
"""Texts whose words are written between two counts."""
SAVE_EVERY = 300.0
"""Seconds between two saves of the training's state. With 3.3 million texts a save writes 2.6 GB."""


def text_batches(
    work: Path, split: str | None = None, size: int = 1000, table: str = "pairs.parquet", skip: int = 0
) -> Iterator[list[str]]:
    """The texts of a table in WORK, of one split or all, in their order, up to `size` at a time.

    table: `pairs.parquet` or `articles.parquet`. The first `skip` texts are left out.
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

    A text of more than MAX_WORDS words is several lines. Texts without a word are left out, because gensim's readers
    number the lines after an empty one differently. A JSON file beside `path` counts what is written. With `resume` a
    stopped call is resumed from the last count.
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
    corpus: Path,
    settings: schema.Doc2Vec,
    seed: int,
    workers: int,
    on_epoch: Callable[[], object] = lambda: None,
    unfinished: Path | None = None,
) -> Doc2Vec:
    """Train Omega on a file of one text a line (Sec. 3.3). `on_epoch` is called after every epoch.

    With the folder `unfinished`, the state of the training is saved there every SAVE_EVERY seconds, and a stopped
    training is resumed from there. With one worker the model is the same as if it had never stopped.

    The vectors of the train texts are dropped. Vectors are inferred instead, and those of 3.3 million captions would
    take 2.6 GB. Raises UserError where no word is frequent enough.
    """
    # With several workers gensim warns in every epoch that their parts of the file have other sizes than expected.
    logging.getLogger("gensim").setLevel(logging.ERROR)
    first = epochs_kept(unfinished) if unfinished else 0
    model = _load_state(unfinished, first) if unfinished and first else untrained(corpus, settings, seed, workers)
    for _ in range(first):
        on_epoch()
    rates, saved = np.linspace(settings.learning_rate, model.min_alpha, settings.epochs + 1), time.monotonic()
    last_rate = model.min_alpha
    for epoch in range(first, settings.epochs):
        # One epoch a call, so that the state can be saved between them. The rate falls as in a single call.
        with _ended_by_a_failed_thread():
            model.train(
                corpus_file=str(corpus),
                total_examples=model.corpus_count,
                total_words=model.corpus_total_words,
                epochs=1,
                start_alpha=float(rates[epoch]),
                end_alpha=float(rates[epoch + 1]),
            )
        model.alpha, model.min_alpha, model.epochs = settings.learning_rate, last_rate, settings.epochs
        if unfinished and epoch + 1 < settings.epochs and time.monotonic() - saved >= SAVE_EVERY:
            _save_state(model, epoch + 1, unfinished)
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

    def interrupt(number: int, frame: FrameType | None) -> None:
        if failed:
            raise KeyboardInterrupt
        if callable(usual_signal):
            usual_signal(number, frame)

    # Of what a shell starts in the background Ctrl-C is ignored, and the wait would not end either.
    usual_signal = signal.signal(signal.SIGINT, interrupt)
    usual, threading.excepthook = threading.excepthook, note
    try:
        yield
    except KeyboardInterrupt:
        if failed:
            raise UserError(f"Doc2Vec cannot be trained: {failed[0]}; run train_doc2vec.py again") from None
        raise
    finally:
        threading.excepthook = usual
        signal.signal(signal.SIGINT, usual_signal)


def _save_state(model: Doc2Vec, epoch: int, folder: Path) -> None:
    """Save a model trained for `epoch` epochs. The vectors of its texts, which are large, go to a file of their own."""
    vectors, model.dv.vectors = model.dv.vectors, np.empty((0, model.vector_size), np.float32)
    try:
        write_array(folder / f"epoch-{epoch}.npy", vectors)
        with written_whole(folder / f"epoch-{epoch}.model") as temporary:
            model.save(str(temporary), sep_limit=sys.maxsize)
    finally:
        model.dv.vectors = vectors
    write_json(folder / "epoch.json", epoch)
    for path in folder.glob("epoch-*"):
        if path.stem != f"epoch-{epoch}":
            path.unlink()


def epochs_kept(folder: Path) -> int:
    """The epochs for which the model saved in `folder` is trained, 0 where there is none."""
    return read_json(folder / "epoch.json") if (folder / "epoch.json").is_file() else 0


def _load_state(folder: Path, epoch: int) -> Doc2Vec:
    """The model that `_save_state` saved in `folder`."""
    model = load_model(folder / f"epoch-{epoch}.model")
    model.dv.vectors = np.load(folder / f"epoch-{epoch}.npy", allow_pickle=False)
    return model


def untrained(corpus: Path, settings: schema.Doc2Vec, seed: int, workers: int) -> Doc2Vec:
    """A model with its vocabulary, before training. Raises UserError where the vocabulary is empty."""
    model = Doc2Vec(
        vector_size=settings.vector_size,
        dm=int(settings.mode == "pv_dm"),
        dbow_words=int(settings.dbow_words),
        hs=int(settings.hierarchical_softmax),
        negative=settings.negative,
        window=settings.window,
        min_count=settings.min_count,
        epochs=settings.epochs,
        alpha=settings.learning_rate,
        seed=seed,
        workers=workers,
    )
    model.build_vocab(corpus_file=str(corpus), keep_raw_vocab=True)
    if not len(model.wv):
        raise UserError(
            f"no word of the train texts is seen doc2vec.min_count = {settings.min_count} times, the most frequent "
            f"{max(model.raw_vocab.values(), default=0)} times; lower doc2vec.min_count"
        )
    model.raw_vocab.clear()
    model.workers = min(model.workers, model.corpus_count)  # a worker without lines would repeat another's
    return model


def save_model(model: Doc2Vec, path: Path) -> None:
    """Save the model as one file, without gensim's log of events, whose times differ from run to run."""
    model.lifecycle_events, model.total_train_time = None, 0.0
    # A resumed training has to write the same file as an undisturbed one. So gensim's notes on loading are removed,
    # attributes are sorted by name, and a round trip through pickle makes the same strings and types shared objects,
    # which pickle writes once.
    model.dv.vectors = model.wv.vectors[:0]
    model = pickle.loads(pickle.dumps(model))
    for part in (model, model.wv, model.dv):
        attributes = sorted(vars(part).items())
        vars(part).clear()
        vars(part).update({name: value for name, value in attributes if not name.startswith("__")})
    model.save(str(path), sep_limit=sys.maxsize)  # gensim would write large arrays to files of their own


def load_model(path: Path, mapped: bool = False) -> Doc2Vec:
    """Load a saved model. Raises UserError where it is missing or broken.

    mapped: for a model that `share_model` wrote. Its arrays are read-only and stay in their files.
    """
    try:
        return Doc2Vec.load(str(path), mmap="r" if mapped else None)
    except Exception as error:  # unpickling raises anything
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())}; remove it and run train_doc2vec.py again"
        ) from None


def share_model(path: Path, folder: Path) -> Path:
    """Copy the model saved as `path` to `folder`, its arrays in files that several processes map into memory together.

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

    <pad> is zero. <start> and <end>, which Doc2Vec does not know, are drawn at the scale of the others.
    """
    learnt = model.wv.vectors
    special = np.random.default_rng(seed).normal(scale=learnt.std(), size=(len(SPECIAL_WORDS), learnt.shape[1]))
    special[0] = 0
    return np.concatenate([special, learnt]).astype(np.float32)


# Inference


def infer(model: Doc2Vec, words: list[str], epochs: int, seed: int) -> np.ndarray:
    """Omega(y): the vector (d,) float32 under which the words of a text are likeliest, by `epochs` steps (Sec. 3.2).

    As `model.infer_vector`, but it depends on the words, the epochs and the seed alone. Unknown words are ignored. The
    vector of a text without a known word means nothing. Sets `model.random`.
    """
    start = zlib.crc32(f"{seed} {' '.join(words)}".encode())
    model.random = np.random.RandomState(start)
    vector = (np.random.default_rng(start).random((1, model.vector_size), dtype=np.float32) - 0.5) / model.vector_size
    update = train_document_dm if model.dm else train_document_dbow
    unlocked = np.ones(1, dtype=np.float32)
    # gensim's own buffers are freed before it writes to them, which crashes from 256 dimensions on.
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
    """What embeds a text: the tokenizer, vocabulary and model that step 1 left in WORK."""

    inference_epochs: int
    seed: int
    tokenizer: Tokenizer
    vocabulary: dict[str, int]
    model: Doc2Vec

    @classmethod
    def load(cls, settings: Settings, shared: Path | None = None) -> "Omega":
        """Read step 1's outputs. shared: the model's file that `share_model` wrote.

        Raises UserError where one is missing or broken.
        """
        work = Work(settings.work_folder)
        return cls(
            inference_epochs=settings.doc2vec.inference_epochs or settings.doc2vec.epochs,
            seed=settings.seed,
            tokenizer=load_tokenizer(work.folder, settings.text, settings.dataset.language),
            vocabulary=read_vocabulary(work.vocabulary),
            model=load_model(shared, mapped=True) if shared else load_model(work.doc2vec_model),
        )

    def embed(self, texts: list[str]) -> Embedded:
        """Vectors and words of texts. A text without a known word has the vector 0 and no words."""
        vectors = np.zeros((len(texts), self.model.vector_size), dtype=np.float32)
        sequences = []
        for row, text in enumerate(texts):
            words = [word for word in self.tokenizer.words(text) if word in self.vocabulary]
            if words:
                vectors[row] = infer(self.model, words, self.inference_epochs, self.seed)
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
    """`Omega.embed` of each batch, in order. The result does not depend on the number of processes.

    Several processes share one copy of the model's arrays, in files that they map into memory. The files lie in
    `folder`, by default the system's for temporary files, and are removed at the end.
    """
    if processes == 1:
        yield from map(Omega.load(settings).embed, batches)
        return
    with tempfile.TemporaryDirectory(prefix="doc2vec-", dir=folder) as files:
        shared = share_model(Work(settings.work_folder).doc2vec_model, Path(files))
        yield from in_order(functools.partial(_embed, pickle.dumps(settings), shared), batches, processes)
