"""Omega: what is trained on, what is kept of the model, and that inference is a function of the words."""

import functools
import itertools
import operator
import signal
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from gensim.models import Doc2Vec as Gensim

from pipeline.errors import UserError
from pipeline.files import write_json, write_text
from pipeline.pairs import SCHEMA, write_pairs
from pipeline.schema import Doc2Vec, Settings, Text
from text_space import doc2vec
from text_space.doc2vec import (
    Omega,
    embed_batches,
    infer,
    load_model,
    save_model,
    start_word_vectors,
    train,
    write_corpus,
)
from text_space.tokenizer import SPECIAL_WORDS, Tokenizer

PETS = "cat dog hamster parrot rabbit kitten puppy whiskers".split()
STARS = "planet comet telescope galaxy orbit asteroid nebula saturn".split()


def texts(count: int = 200, seed: int = 0) -> list[str]:
    """Texts of eight words, pets and stars in turn."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice((PETS, STARS)[row % 2], size=8)) for row in range(count)]


def chosen(**doc2vec_settings: object) -> Settings:
    small = {"vector_size": 12, "min_count": 2, "epochs": 10, "window": 3, **doc2vec_settings}
    return Settings(deterministic=True, text=Text(max_sentences=None), doc2vec=Doc2Vec(**small))


def dbow(**others: object) -> Settings:
    return chosen(mode="pv_dbow", hierarchical_softmax=False, negative=5, **others)


def trained(settings: Settings, folder: Path, of: list[str] | None = None) -> Gensim:
    corpus = folder / "corpus.txt"
    write_corpus(of or texts(), Tokenizer(settings.text, settings.dataset.language, {"language": "en"}), corpus)
    return train(corpus, settings.doc2vec, settings.seed, workers=1 if settings.deterministic else 4)


def write_omega(settings: Settings, folder: Path) -> None:
    """Step 1's outputs in WORK."""
    settings.work = str(folder)
    model = trained(settings, folder)
    (folder / "doc2vec").mkdir()
    save_model(model, folder / "doc2vec" / "model")
    write_json(folder / "doc2vec" / "punkt.json", {"language": "en"})
    write_text(folder / "doc2vec" / "vocabulary.txt", "\n".join([*SPECIAL_WORDS, *model.wv.index_to_key]) + "\n")


# Training


def test_corpus_has_a_line_for_every_text_with_words(tmp_path: Path) -> None:
    settings = chosen()
    path = tmp_path / "corpus.txt"
    given = ["Cats, dogs\nand  planets!", "?!", "", "the of", "comet " * (doc2vec.MAX_WORDS + 5)]
    assert write_corpus(given, Tokenizer(settings.text, settings.dataset.language, {"language": "en"}), path) == 2
    first, second, rest = path.read_text().splitlines()
    assert first == "cats dogs planets"
    assert len(second.split()) == doc2vec.MAX_WORDS and rest.split() == 5 * ["comet"]


def test_corpus_on_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_corpus(
            ["comet"],
            Tokenizer(chosen().text, chosen().dataset.language, {"language": "en"}),
            tmp_path / "missing" / "corpus.txt",
        )


def test_no_frequent_word_is_the_users_mistake(tmp_path: Path) -> None:
    settings = chosen(min_count=1000)
    with pytest.raises(UserError, match=r"doc2vec.min_count = 1000 times, the most frequent \d\d\d times; lower"):
        trained(settings, tmp_path)
    with pytest.raises(UserError, match="the most frequent 0 times"):
        trained(settings, tmp_path, ["?!"])


@pytest.mark.parametrize("settings", [chosen(), dbow(), dbow(dbow_words=False)], ids=["pv_dm", "pv_dbow", "no words"])
def test_settings_reach_gensim(settings: Settings, tmp_path: Path) -> None:
    epochs = []
    corpus = tmp_path / "corpus.txt"
    write_corpus(texts(), Tokenizer(settings.text, settings.dataset.language, {"language": "en"}), corpus)
    model = train(corpus, settings.doc2vec, settings.seed, 1, lambda: epochs.append(1))
    assert len(epochs) == 10
    assert model.dm == (settings.doc2vec.mode == "pv_dm")
    assert (model.hs, model.negative) == ((1, 0) if model.dm else (0, 5))
    assert (model.vector_size, model.window, model.min_count, model.epochs, model.workers) == (12, 3, 2, 10, 1)
    assert sorted(model.wv.index_to_key) == sorted(PETS + STARS)
    # dbow_words false leaves word vectors where they began: within 1 / d of zero.
    assert (np.abs(model.wv.vectors).max() > 1 / 12) == (settings.doc2vec.dbow_words or bool(model.dm))


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_a_training_whose_thread_fails_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: Any) -> None:
    """gensim waits for ever for the last message of a thread that has failed. In the background Ctrl-C is ignored."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory for a thread")

    monkeypatch.setattr(Gensim, "_do_train_epoch", fail)
    usual, before = threading.excepthook, signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(UserError, match="Doc2Vec cannot be trained: no memory for a thread; run train_doc2vec.py"):
            trained(chosen(), tmp_path)
        assert threading.excepthook is usual and signal.getsignal(signal.SIGINT) is ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)


def test_more_workers_than_texts(tmp_path: Path) -> None:
    settings = chosen()
    settings.deterministic = False
    assert trained(settings, tmp_path, ["comet comet planet planet"]).workers == 1


def test_model_is_one_file_without_train_vectors(tmp_path: Path) -> None:
    model = trained(chosen(), tmp_path)
    assert len(model.dv) == 0
    model.some_large_array = np.zeros(11 * 2**20, dtype=np.int8)  # as many numbers as gensim would part from the rest
    folder = tmp_path / "saved"
    folder.mkdir()
    save_model(model, folder / "model")
    assert [path.name for path in folder.iterdir()] == ["model"]
    same = load_model(folder / "model")
    assert np.array_equal(infer(model, ["comet", "orbit"], 5, 0), infer(same, ["comet", "orbit"], 5, 0))


def test_broken_model_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"no pickle")
    for name in ("model", "missing"):
        with pytest.raises(UserError, match="run train_doc2vec.py again"):
            load_model(tmp_path / name)


def test_start_word_vectors(tmp_path: Path) -> None:
    model = trained(dbow(), tmp_path)
    vectors = start_word_vectors(model, seed=3)
    assert vectors.dtype == np.float32 and vectors.shape == (3 + 16, 12)
    assert not vectors[0].any()
    assert np.array_equal(vectors[3:], model.wv.vectors)
    assert 0.3 < vectors[1:3].std() / model.wv.vectors.std() < 3
    assert np.array_equal(vectors, start_word_vectors(model, 3))
    assert not np.array_equal(vectors[1], start_word_vectors(model, 4)[1])


# Inference


@pytest.mark.parametrize("settings", [chosen(), dbow()], ids=["pv_dm", "pv_dbow"])
def test_infer_is_gensims_inference(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same start and the same random state gensim's own method gives the same vector."""
    model, words = trained(settings, tmp_path), ["comet", "orbit", "comet", "dog"]
    vector = infer(model, words, epochs=7, seed=5)
    start = zlib.crc32(b"5 comet orbit comet dog")
    drawn = (np.random.default_rng(start).random(12, dtype=np.float32) - 0.5) / 12
    monkeypatch.setattr("gensim.models.doc2vec.pseudorandom_weak_vector", lambda size, seed_string: drawn)
    model.random = np.random.RandomState(start)
    np.testing.assert_allclose(vector, model.infer_vector(words, epochs=7), rtol=1e-5)


@pytest.mark.parametrize("make", [chosen, dbow], ids=["pv_dm", "pv_dbow"])
def test_the_end_of_a_long_text_is_trained_on_and_has_part_in_its_vector(
    make: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gensim passes over all words from the 10,001st on."""
    early, late = [(words * doc2vec.MAX_WORDS)[: doc2vec.MAX_WORDS] for words in (PETS, STARS)]
    model = trained(make(epochs=1), tmp_path, [" ".join(early + late)])
    assert {*model.wv.key_to_index} == {*PETS, *STARS} and model.corpus_total_words == 2 * doc2vec.MAX_WORDS
    monkeypatch.setattr(doc2vec.zlib, "crc32", lambda _: 7)  # the same random start for every text
    vectors = [infer(model, words, 2, 0) for words in (early, early + late, early + late[:1000])]
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(vectors, 2))


@pytest.mark.parametrize("make", [chosen, dbow], ids=["pv_dm", "pv_dbow"])
def test_inference_of_many_dimensions(make: Callable[..., Settings], tmp_path: Path) -> None:
    """Without arrays of our own gensim writes where others allocate, from 256 dimensions on."""
    model = trained(make(vector_size=300, epochs=1), tmp_path)
    vectors = [infer(model, text.split(), 3, 0) for text in texts(50)]
    again = [infer(model, text.split(), 3, 0) for text in texts(50)]
    assert np.isfinite(vectors).all() and np.array_equal(vectors, again)


def test_infer_depends_on_words_epochs_and_seed_alone(tmp_path: Path) -> None:
    model, words = trained(dbow(), tmp_path), ["comet", "orbit", "nebula"]
    vector = infer(model, words, 5, 0)
    infer(model, ["dog"], 3, 9)
    model.random.rand(17)
    assert np.array_equal(vector, infer(model, words, 5, 0))
    assert vector.shape == (12,) and vector.dtype == np.float32
    for other in (infer(model, words[::-1], 5, 0), infer(model, words, 6, 0), infer(model, words, 5, 1)):
        assert not np.array_equal(vector, other)


def test_texts_of_a_topic_are_neighbors(tmp_path: Path) -> None:
    model = trained(dbow(epochs=40), tmp_path)
    vectors = np.stack([infer(model, text.split(), 40, 0) for text in texts(40, seed=1)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T - 2 * np.eye(40)
    assert (similarity.argmax(axis=1) % 2 == np.arange(40) % 2).mean() > 0.95


def test_embed(tmp_path: Path) -> None:
    settings = dbow(inference_epochs=3)
    write_omega(settings, tmp_path)
    omega = Omega.load(settings)
    vectors, lengths, tokens = omega.embed(["A comet; the unheard-of orbit!", "", "unheard", "comet orbit"])
    assert lengths.tolist() == [4, 0, 0, 4]
    assert tokens.tolist() == 2 * [1, omega.vocabulary["comet"], omega.vocabulary["orbit"], 2]
    assert (vectors.dtype, lengths.dtype, tokens.dtype) == (np.float32, np.int64, np.int32)
    assert not vectors[1:3].any()
    assert np.array_equal(vectors[0], vectors[3]) and np.array_equal(
        vectors[0], infer(omega.model, ["comet", "orbit"], 3, 0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", [chosen(), dbow()], ids=["pv_dm", "pv_dbow"])
def test_processes_do_not_change_the_result(settings: Settings, tmp_path: Path) -> None:
    write_omega(settings, tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir()
    batches = [texts(7, seed) for seed in range(5)]
    alone, together = (list(embed_batches(settings, batches, processes, shared)) for processes in (1, 2))
    assert len(alone) == len(together) == 5
    for one, two in zip(alone, together, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not list(shared.iterdir())


@pytest.mark.parametrize("settings", [chosen(), dbow()], ids=["pv_dm", "pv_dbow"])
def test_shared_model_is_mapped_and_infers_the_same(settings: Settings, tmp_path: Path) -> None:
    write_omega(settings, tmp_path)
    own = load_model(tmp_path / "doc2vec" / "model")
    shared = load_model(doc2vec.share_model(tmp_path / "doc2vec" / "model", tmp_path), mapped=True)
    output = shared.syn1 if settings.doc2vec.hierarchical_softmax else shared.syn1neg
    for array in (shared.wv.vectors, output):
        assert isinstance(array, np.memmap) and not array.flags.writeable
    words = ["comet", "orbit", "dog"]
    assert np.array_equal(infer(own, words, 5, 0), infer(shared, words, 5, 0))


def test_a_model_that_cannot_be_shared_is_the_users_mistake(tmp_path: Path) -> None:
    write_omega(dbow(), tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        doc2vec.share_model(tmp_path / "doc2vec" / "model", tmp_path / "missing")


def test_text_batches(tmp_path: Path) -> None:
    rows = [
        {"image_id": str(row), "image_path": "", "text": f"text {row}", "category": None, "split": split}
        for row, split in enumerate(["train", "val", "train", "test", "train"])
    ]
    write_pairs(tmp_path / "pairs.parquet", [pa.RecordBatch.from_pylist(rows, schema=SCHEMA)], tmp_path)
    assert list(doc2vec.text_batches(tmp_path, size=2)) == [["text 0", "text 1"], ["text 2", "text 3"], ["text 4"]]
    assert functools.reduce(operator.iadd, doc2vec.text_batches(tmp_path, "train", size=2), []) == [
        "text 0",
        "text 2",
        "text 4",
    ]
