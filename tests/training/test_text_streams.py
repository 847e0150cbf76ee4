"""Text streams and neighbor spaces that read no words: a sentence encoder of random weights, and vectors in a file."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, one_line_error, run_script

import encode
import evaluate
import knn_document_features
import text_space.sentences
import train_cross_modal_retrieval_model as training
from models import build_model
from pipeline.errors import UserError
from pipeline.files import LOCK, read_array, read_json
from pipeline.pairs import read_pairs
from pipeline.schema import Settings, TextEncoder
from pipeline.work import Work, space_folder
from training.encoder import RunEncoder
from training.text_streams import load_pairs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sentence encoder: BERT with random weights, 16 numbers a text."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=256, **shape)).save_pretrained(folder)
    modules = [Transformer(str(folder), max_seq_length=256), Pooling(16)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "whole"))
    return folder / "whole"


def texts_of(work: Path) -> list[str]:
    texts: list[str] = read_pairs(work, ["text"])["text"].to_pylist()
    return texts


def given(work: Path, folder: Path) -> tuple[Path, np.ndarray]:
    """A file with a vector for every pair, equal where texts are."""
    texts = texts_of(work)
    drawn = dict(zip(texts, np.random.default_rng(0).normal(size=(len(texts), 6)), strict=True))
    vectors = np.array([drawn[text] for text in texts])
    np.save(folder / "vectors.npy", vectors)
    return folder / "vectors.npy", vectors


def test_a_frozen_sentence_encoder_is_trained_evaluated_and_searched(
    prepared: Path, sentences: Path, tmp_path: Path
) -> None:
    """Its vectors are those of the library; texts of no known word are found; its name and its files are the run's."""
    from sentence_transformers import SentenceTransformer

    name = f"sentence_transformers:{sentences}"
    words = [*TINY, "--work", str(prepared), "--model.text.encoder", name, "--training.max_epochs", "1"]
    run = training.main(["1", "0.3", "0.2", *words])
    settings = Settings(work=str(prepared))
    data = load_pairs(prepared, settings.features_folder, TextEncoder(encoder=name), CPU)
    texts, expected = texts_of(prepared), SentenceTransformer(str(sentences), device="cpu")
    vectors, lengths = data.read.texts(np.array([3, 70]))
    np.testing.assert_allclose(vectors, expected.encode([texts[3], texts[70]]), atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
    assert lengths.tolist() == [1, 1]
    kept = torch.load(run / "best.pt", weights_only=True)["model"]
    assert {key for key in kept if key.startswith("texts.")} == {"texts.project.weight", "texts.project.bias"}
    assert kept["texts.project.weight"].shape == (16, 16)

    evaluate.main(["--run", str(run)])
    assert (run / "metrics.json").is_file()
    encoder = RunEncoder(run)
    found, problems = encoder.texts(["qqxx zzyy", "  "])
    assert problems == {1: "it is empty"} and np.isnan(found[1]).all()
    wanted = encoder.model.texts(torch.from_numpy(expected.encode(["qqxx zzyy"])), torch.ones(1))
    np.testing.assert_allclose(found[0], wanted[0].detach(), atol=1e-5)
    (tmp_path / "texts.txt").write_text("one text\nanother\n")
    encode.main(["--run", str(run), "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out.npy")])
    assert np.load(tmp_path / "out.npy").shape == (2, 16)
    answer = run_script("search.py", "--run", run, "qqxx", "--json").stdout
    assert '"images"' in answer and "qqxx" in answer


def test_other_weights_of_a_sentence_encoder_are_another_run(prepared: Path, sentences: Path, tmp_path: Path) -> None:
    own = shutil.copytree(sentences, tmp_path / "own")
    name = f"sentence_transformers:{own}"
    words = [*TINY, "--work", str(prepared), "--model.text.encoder", name, "--training.max_epochs", "1"]
    run = training.main(["1", "0", "0", *words])
    weights = next(own.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError, match="trained on another model.text.encoder"):
        RunEncoder(run)
    with pytest.raises(UserError, match="on another model.text.encoder"):
        training.main(["1", "0", "0", *words])


def test_a_trainable_sentence_encoder_learns_and_reads_as_the_library(prepared: Path, sentences: Path) -> None:
    from sentence_transformers import SentenceTransformer

    name = f"sentence_transformers:{sentences}"
    text = TextEncoder(encoder=name, trainable=True)
    data = load_pairs(prepared, prepared / "features", text, CPU)
    settings = Settings()
    settings.model.text, settings.model.dimensions = text, 8
    settings.model.image.backbone, settings.model.image.weights = "resnet18", "none"
    model = build_model(settings.model, np.zeros((5, 4), dtype=np.float32), 0).eval()
    by_length = np.argsort(data.read.lengths(np.arange(len(data.image_ids))), kind="stable")
    some = by_length[[0, len(by_length) // 2, -1]]
    tokens, lengths = data.read.texts(some)
    assert lengths.unique().numel() > 1
    wanted = SentenceTransformer(str(sentences), device="cpu").encode([texts_of(prepared)[row] for row in some])
    y = model.texts(tokens, lengths)
    expected = torch.nn.functional.normalize(model.texts.project(torch.from_numpy(wanted)), dim=1)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    words = [*TINY, "--work", str(prepared), "--model.text.encoder", name, "--model.text.trainable", "true"]
    run = training.main(["1", "0", "0", *words, "--training.max_epochs", "1", "--training.learning_rate", "0.01"])
    before = model.texts.state_dict()
    kept = torch.load(run / "best.pt", weights_only=True)["model"]
    key = next(name for name in before if name.endswith("query.weight"))
    assert not torch.equal(kept[f"texts.{key}"], before[key])
    assert RunEncoder(run).texts(["some text"])[1] == {}


@pytest.mark.parametrize("listed", [False, True])
def test_vectors_in_a_file_are_a_text_stream_and_a_space(prepared: Path, tmp_path: Path, listed: bool) -> None:
    """By pair number, or in any order with texts.txt beside them. Other texts have a problem and no vector."""
    path, vectors = given(prepared, tmp_path)
    if listed:
        order = np.random.default_rng(1).permutation(len(vectors))
        np.save(path, vectors[order].astype(np.float16))
        lines = ["  ".join(texts_of(prepared)[row].split()) for row in order]
        (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    words = [*TINY, "--work", str(prepared), "--neighbors.space", f"file:{path}", "--neighbors.method", "exact"]
    knn_document_features.main(words)
    files = Work(prepared).neighbors(f"file:{path}")
    rows, indices = read_array(files.rows), read_array(files.indices)
    assert files.folder.name == space_folder(f"file:{path}") != "file"
    data = load_pairs(prepared, tmp_path, TextEncoder(encoder=f"features:{path}"), CPU)
    np.testing.assert_allclose(data.read.texts(np.arange(len(vectors)))[0], vectors, atol=1e-2 if listed else 1e-6)
    for row, found in list(zip(rows, indices, strict=True))[:20]:
        others = [
            other
            for other in rows
            if data.image_ids[other] != data.image_ids[row]
            and data.tokens[slice(*data.offsets[other : other + 2])].tobytes()
            != data.tokens[slice(*data.offsets[row : row + 2])].tobytes()
        ]
        distances = np.linalg.norm(vectors[others] - vectors[row], axis=1)
        farthest = np.linalg.norm(vectors[found] - vectors[row], axis=1).max()
        assert farthest <= np.sort(distances)[len(found) - 1] + (1e-2 if listed else 1e-6)
    run = training.main(
        ["1", "0.3", "0.2", *words, "--model.text.encoder", f"features:{path}", "--training.max_epochs", "1"]
    )
    assert read_json(run / "inputs.json")["model.text.encoder"]
    evaluate.main(["--run", str(run)])
    found, problems = RunEncoder(run).texts(["new"])
    assert np.isnan(found).all() and "of no others" in problems[0]


def test_another_file_makes_the_neighbors_stale(prepared: Path, tmp_path: Path) -> None:
    path, vectors = given(prepared, tmp_path)
    words = [*TINY, "--work", str(prepared), "--neighbors.space", f"file:{path}"]
    knn_document_features.main(words)
    np.save(path, vectors + 1)
    with pytest.raises(UserError, match="was made from other published files .*; run knn_document_features.py"):
        training.main(["1", "0.3", "0.2", *words])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("missing", "there is no file"),
        ("short", "has 5 rows for 1.. pairs; give a row a pair, or put texts.txt beside it"),
        ("cube", "and rows of numbers are needed"),
        ("nan", "row 3 of .* is NaN or infinite"),
        ("unlisted", "does not list 1 of 1.. items, the first: '"),
        ("uneven", "has 2 lines for the 1.. rows"),
    ],
)
def test_a_file_that_lacks_texts_ends_in_one_line(prepared: Path, tmp_path: Path, broken: str, message: str) -> None:
    path, vectors = given(prepared, tmp_path)
    if broken == "missing":
        path.unlink()
    elif broken == "nan":
        vectors[3, 2] = np.nan
        np.save(path, vectors)
    elif broken in ("short", "cube"):
        np.save(path, vectors[:5] if broken == "short" else vectors[None])
    else:
        texts = texts_of(prepared)
        lines = ["a", "b"] if broken == "uneven" else [*texts[:-1], "something else"]
        (tmp_path / "texts.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message) as error:
        load_pairs(prepared, tmp_path, TextEncoder(encoder=f"features:{path}"), CPU)
    assert "model.text.encoder" in str(error.value) and "\n" not in str(error.value)


def test_spaces_of_a_sentence_encoder(prepared: Path, sentences: Path) -> None:
    """`sentences` takes the encoder of model.text.encoder; both ways it finds the same."""
    words = [*TINY, "--work", str(prepared), "--neighbors.method", "exact"]
    named = f"sentences:{sentences}"
    knn_document_features.main([*words, "--neighbors.space", named])
    same = ["--model.text.encoder", f"sentence_transformers:{sentences}"]
    knn_document_features.main([*words, "--neighbors.space", "sentences", *same])
    found = [read_array(Work(prepared).neighbors(space).indices) for space in (named, "sentences")]
    assert np.array_equal(found[0], found[1])
    done = run_script("knn_document_features.py", *words, "--neighbors.space", "sentences", ok=False)
    assert "goes with model.text.encoder" in one_line_error(done)


def test_vectors_of_texts_that_were_stopped_are_resumed_and_nothing_else_is_kept(
    sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {letter} of ten" for letter in "abcdefghij"]
    undisturbed = text_space.sentences.cached_vectors(sentences, texts, tmp_path / "one", CPU)
    usual, encoded = text_space.sentences.encode, []

    def encode_some(encoder: object, some: list[str], *size: int) -> np.ndarray:
        if stopping and len(encoded) == 5:  # the size, and two times two texts
            raise KeyboardInterrupt
        encoded.extend(some)
        return usual(encoder, some, *size)

    monkeypatch.setattr(text_space.sentences, "encode", encode_some)
    monkeypatch.setattr(text_space.sentences, "TEXTS_AT_A_TIME", 2)
    stopping = True
    with pytest.raises(KeyboardInterrupt):
        text_space.sentences.cached_vectors(sentences, texts, tmp_path / "two", CPU)
    stopping = False
    resumed = text_space.sentences.cached_vectors(sentences, texts, tmp_path / "two", CPU)
    assert encoded == ["size", *texts[:4], "size", *texts[4:]]
    assert np.allclose(resumed, undisturbed, atol=1e-6)  # batches of other sizes are rounded otherwise
    (cache,) = (tmp_path / "two").iterdir()
    for name in ("distinct.npy", "done.json"):  # as a kill right after the last write leaves them
        (cache / name).write_text("0")
    assert np.array_equal(text_space.sentences.cached_vectors(sentences, texts, tmp_path / "two", CPU), resumed)
    assert {path.name for path in cache.iterdir()} - {LOCK} == {"vectors.npy"}


def test_without_the_library_one_line_names_what_to_install(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    words = [*TINY, "--work", str(prepared), "--model.text.encoder", "sentence_transformers:all-MiniLM-L6-v2"]
    with pytest.raises(UserError) as error:
        training.main(["1", "0", "0", *words])
    message = str(error.value)
    assert "model.text.encoder" in message and "pip install -r requirements-encoders.txt" in message
