"""Steps 1 to 3 as their users run them: files, figures, mistakes, and the same bytes from the same command."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import one_line_error, run_script
from gensim.models import Doc2Vec as Gensim

import extract_doc2vec_vectors
import knn_document_features
import train_doc2vec
from pipeline.errors import UserError
from pipeline.pairs import SCHEMA, write_pairs
from pipeline.schema import Dataset, Settings
from pipeline.steps import EXTRACT_DOC2VEC, FIND_NEIGHBORS, PREPARE, TRAIN_DOC2VEC, making, output_paths, stamp_path
from text_space import inference
from text_space.doc2vec import infer, text_batches
from text_space.table import shorten

SCRIPTS = ("train_doc2vec.py", "extract_doc2vec_vectors.py", "knn_document_features.py")
STEPS = (TRAIN_DOC2VEC, EXTRACT_DOC2VEC, FIND_NEIGHBORS)
MAINS = (train_doc2vec.main, extract_doc2vec_vectors.main, knn_document_features.main)

TOPICS = {
    "pets": "cat dog hamster parrot rabbit kitten puppy whiskers".split(),
    "stars": "planet comet telescope galaxy orbit asteroid nebula saturn".split(),
}


def pair_rows(seed: int = 0) -> list[dict[str, str | None]]:
    """120 pairs of two topics. 0 and 2 have one text, 4 and 6 one image, 8 no category, 10 and 11 no known word."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, str | None]] = []
    for row in range(120):
        topic = list(TOPICS)[row % 2]
        words = rng.choice(TOPICS[topic], size=8)
        rows.append(
            {
                "image_id": f"image-{row}",
                "image_path": f"{row}.png",
                "text": f"<p>The {' '.join(words[:4])}. Dr. {' '.join(words[4:])}!</p> A third sentence.",
                "category": topic,
                "split": "test" if row >= 100 else "val" if row >= 90 else "train",
            }
        )
    rows[2]["text"] = rows[0]["text"]
    rows[6]["image_id"] = rows[4]["image_id"]
    rows[8]["category"] = None
    rows[10]["text"] = "?!"
    rows[11]["text"] = "unheard"
    return rows


def prepare(work: Path, rows: list[dict[str, str | None]] | None = None) -> None:
    """What step 0 leaves."""
    with making(PREPARE, Settings(work=str(work), dataset=Dataset(source="manifest", manifest="m"))):
        table = [pa.RecordBatch.from_pylist(rows or pair_rows(), schema=SCHEMA)]
        write_pairs(work / "pairs.parquet", table, work)
        (work / "rejected.jsonl").write_text("")


def words(work: Path, *more: str) -> list[str]:
    """The command line of all three steps."""
    (work / "config.yaml").write_text(
        "deterministic: true\n"
        "dataset: {source: manifest, manifest: m}\n"
        "doc2vec: {mode: pv_dbow, hierarchical_softmax: false, negative: 5, vector_size: 12, window: 3, min_count: 3,"
        " epochs: 40}\n"
        "neighbors: {k: 10}\n"
    )
    return ["--config", str(work / "config.yaml"), "--work", str(work), *more]


def settings_of(work: Path) -> Settings:
    return Settings(work=str(work))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """All steps run as scripts, and again in this process, whose hash seed is another; and what the scripts printed."""
    as_scripts, here = (tmp_path_factory.mktemp("run") / "work" for _ in range(2))
    prepare(as_scripts)
    prepare(here)
    printed = []
    for script, main in zip(SCRIPTS, MAINS, strict=True):
        done = run_script(script, *words(as_scripts), PYTHONHASHSEED="1", COLUMNS="80")
        assert done.stderr == ""  # no progress bars where nobody watches
        printed.append(done.stdout)
        main(words(here))
    return as_scripts, here, printed


@pytest.fixture
def work(two_runs: tuple[Path, Path, list[str]], tmp_path: Path) -> Path:
    """A copy of WORK after step 3, to do anything with."""
    return Path(shutil.copytree(two_runs[0], tmp_path / "work"))


# Files and figures


def test_the_same_command_writes_the_same_bytes(two_runs: tuple[Path, Path, list[str]]) -> None:
    first, second, _ = two_runs
    for step in STEPS:
        for one, two in zip(
            output_paths(step, settings_of(first)), output_paths(step, settings_of(second)), strict=True
        ):
            assert one.read_bytes() == two.read_bytes(), one.name
        assert sorted(path.name for path in first.rglob("*")) == sorted(path.name for path in second.rglob("*"))


def test_every_output_is_named_last(two_runs: tuple[Path, Path, list[str]]) -> None:
    work, _, printed = two_runs
    for step, text in zip(STEPS, printed, strict=True):
        names = [f"wrote {path}" for path in output_paths(step, settings_of(work))]
        *told, last = text.splitlines()
        assert told[-len(names) :] == names and last.startswith("next: python ")
    left = {path.name for path in (work / "doc2vec").iterdir()}
    assert left == {
        *("model", "vocabulary.txt", "word_vectors.npy", "punkt.json", "vectors.npy", "tokens.npy", "offsets.npy"),
        *("train_doc2vec.json", "extract_doc2vec_vectors.json"),
    }


def test_step_1(two_runs: tuple[Path, Path, list[str]]) -> None:
    work, _, printed = two_runs
    vocabulary = (work / "doc2vec" / "vocabulary.txt").read_text().splitlines()
    assert vocabulary[:3] == ["<pad>", "<start>", "<end>"]
    assert sorted(vocabulary[3:]) == sorted(TOPICS["pets"] + TOPICS["stars"])  # not: third, sentence, unheard
    model = Gensim.load(str(work / "doc2vec" / "model"))
    assert model.wv.index_to_key == vocabulary[3:]
    vectors = np.load(work / "doc2vec" / "word_vectors.npy")
    assert vectors.dtype == np.float32 and vectors.shape == (19, 12)
    assert np.array_equal(vectors[3:], model.wv.vectors)
    assert "dr" in json.loads((work / "doc2vec" / "punkt.json").read_text())["abbreviations"]
    figures = json.loads(stamp_path(TRAIN_DOC2VEC, settings_of(work)).read_text())["figures"]
    assert figures.pop("words_per_second") > 0
    of_words = {"words": 88 * 8 + 1, "vocabulary": 16, "known_share": round(88 * 8 / (88 * 8 + 1), 4)}
    assert figures == {"texts": 90, "texts_without_words": 1, **of_words}
    assert "90 texts (1 without a word), 705 words, a vocabulary of 16 that knows 1.00 of them; " in printed[0]


def test_step_2(two_runs: tuple[Path, Path, list[str]]) -> None:
    work, _, printed = two_runs
    vectors, tokens, offsets = (np.load(path) for path in output_paths(EXTRACT_DOC2VEC, settings_of(work)))
    assert (vectors.dtype, tokens.dtype, offsets.dtype) == (np.float32, np.int32, np.int64)
    assert vectors.shape == (120, 12) and offsets.shape == (121,) and offsets[-1] == len(tokens)
    assert np.flatnonzero(np.diff(offsets) == 0).tolist() == [10, 11]
    assert np.flatnonzero(~vectors.any(axis=1)).tolist() == [10, 11]
    vocabulary = (work / "doc2vec" / "vocabulary.txt").read_text().splitlines()
    of_119 = [vocabulary[token] for token in tokens[offsets[119] : offsets[120]]]
    text = str(pair_rows()[119]["text"]).removeprefix("<p>The ").split("!")[0].replace(".", "").split()
    text.remove("Dr")
    assert of_119 == ["<start>", *text, "<end>"]
    model = Gensim.load(str(work / "doc2vec" / "model"))
    assert np.array_equal(vectors[119], infer(model, text, 40, 0))
    assert np.array_equal(vectors[0], vectors[2])
    assert "120 texts of 8.0 known words; without any: 2 of train, 0 of val, 0 of test" in printed[1]


@pytest.mark.slow
def test_batches_and_processes_do_not_change_the_files(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [path.read_bytes() for path in output_paths(EXTRACT_DOC2VEC, settings_of(work))]
    stamp_path(EXTRACT_DOC2VEC, settings_of(work)).unlink()
    monkeypatch.setattr(inference, "text_batches", lambda work, skip: text_batches(work, size=50, skip=skip))
    monkeypatch.setattr(inference, "TEXTS_WORTH_A_PROCESS", 100)
    monkeypatch.setattr(inference, "cores", lambda: 2)
    extract_doc2vec_vectors.main(words(work))
    assert before == [path.read_bytes() for path in output_paths(EXTRACT_DOC2VEC, settings_of(work))]


def test_step_3(two_runs: tuple[Path, Path, list[str]]) -> None:
    work, _, printed = two_runs
    rows, indices, distances = (np.load(path) for path in output_paths(FIND_NEIGHBORS, settings_of(work)))
    assert (rows.dtype, indices.dtype, distances.dtype) == (np.int32, np.int32, np.float32)
    assert rows.tolist() == [row for row in range(90) if row not in (10, 11)]
    assert indices.shape == distances.shape == (88, 10)
    assert set(indices.ravel()) <= set(rows)
    table = dict(zip(rows.tolist(), indices.tolist(), strict=True))
    assert not any(row in table[row] for row in table)
    assert 2 not in table[0] and 0 not in table[2] and 4 not in table[6] and 6 not in table[4]
    vectors = np.load(work / "doc2vec" / "vectors.npy")
    for line, row in enumerate(rows):
        wanted = np.linalg.norm(vectors[indices[line]] - vectors[row], axis=1)
        np.testing.assert_allclose(distances[line], wanted, rtol=1e-5)
        assert (np.diff(distances[line]) >= 0).all()

    figures = json.loads(stamp_path(FIND_NEIGHBORS, settings_of(work)).read_text())["figures"]
    # 87 of the 88 have a category: 43 pets, 44 stars.
    assert figures["category_chance"] == round((43 * 42 + 44 * 43) / (87 * 86), 4)
    assert figures["category_share"] > 0.9
    assert (figures["rows"], figures["train_pairs"], figures["method"]) == (88, 90, "hnsw")
    said = re.search(r"(0.\d{3}) of the 10 nearest texts have the text's category; by chance (0.\d{3})", printed[2])
    assert figures["category_chance_low"] < figures["category_chance"] < figures["category_chance_high"] < 0.7
    assert "known word: 88 of train, 10 of val, 20 of test\n" in printed[2] and "warning" not in printed[2]
    shares = [figures["category_share"], figures["category_chance"]]
    assert said and [float(number) for number in said.groups()] == pytest.approx(shares, abs=0.001)
    shown = printed[2].split("\n\n")
    assert len(shown) == 5 and all(len(part.splitlines()) == 11 for part in shown[1:4])
    assert max(len(line) for part in shown[1:4] for line in part.splitlines()) <= 80


def test_cosine_and_hnsw_from_the_command_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cosine = words(work, "--neighbors.distance", "cosine", "--neighbors.k", "5")
    knn_document_features.main(cosine)
    rows, exact, distances = (np.load(path) for path in output_paths(FIND_NEIGHBORS, settings_of(work)))
    vectors = np.load(work / "doc2vec" / "vectors.npy")[rows]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = unit[np.searchsorted(rows, exact[:, 0])]
    np.testing.assert_allclose(distances[:, 0], 1 - (unit * nearest).sum(axis=1), atol=1e-6)
    knn_document_features.main([*cosine, "--neighbors.method", "hnsw", "--neighbors.min_recall", "1"])
    assert np.array_equal(np.load(output_paths(FIND_NEIGHBORS, settings_of(work))[1]), exact)
    printed = capsys.readouterr().out
    assert "making it anew" in printed and "recall 1.0000 against exact search, on 88 of the texts" in printed
    figures = json.loads(stamp_path(FIND_NEIGHBORS, settings_of(work)).read_text())["figures"]
    assert figures["recall"] == 1 and figures["ef_search"] >= 5 and figures["recall_sample"] == 88


def test_a_k_that_only_fills_memory_is_a_mistake(work: Path) -> None:
    with pytest.raises(UserError, match=r"neighbors\.k is 2000000000 and there are 88 train texts; lower it"):
        knn_document_features.main(words(work, "--neighbors.k", "2000000000"))


def test_k_larger_than_the_train_split(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    knn_document_features.main(words(work, "--neighbors.k", "100"))
    assert "neighbors.k is 100 and there are 88 train texts: the table is filled up with -1" in capsys.readouterr().out
    _, indices, distances = (np.load(path) for path in output_paths(FIND_NEIGHBORS, settings_of(work)))
    assert indices.shape == (88, 100)
    assert (indices[0] >= 0).sum() == 86 and (indices[10] >= 0).sum() == 87  # 0's text is 2's too
    assert np.array_equal(indices < 0, np.isinf(distances))


def test_pairs_without_categories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    prepare(work, [{**row, "category": None} for row in pair_rows()])
    for main in MAINS:
        main(words(work))
    assert "category" not in capsys.readouterr().out
    assert "category_share" not in json.loads(stamp_path(FIND_NEIGHBORS, settings_of(work)).read_text())["figures"]


def test_shorten() -> None:
    assert shorten("one\n two", 7) == "one two"
    assert shorten("one\n two!", 7) == "one tw…"
    assert shorten("狐狸和狗", 8) == "狐狸和狗"
    assert shorten("狐狸和狗", 7) == "狐狸和…"
    assert shorten("狐狸和狗", 6) == "狐狸…"
    assert shorten("狐狸", 1) == "…"


# Up to date, or not


def test_a_second_call_does_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    for main, step in zip(MAINS, STEPS, strict=True):
        main(words(work))
        assert capsys.readouterr().out.splitlines() == [
            f"up to date {p}" for p in output_paths(step, settings_of(work))
        ]
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}


@pytest.mark.parametrize(("step", "names"), [(1, "train_doc2vec.py"), (2, "train_doc2vec.py")])
def test_other_pairs_call_for_step_1(work: Path, step: int, names: str) -> None:
    prepare(work, pair_rows(seed=1))
    with pytest.raises(UserError, match=f"was made from another pairs.parquet; run {names}"):
        MAINS[step](words(work))


@pytest.mark.parametrize("main", MAINS)
def test_other_settings_of_the_dataset_call_for_step_0(main: Callable[[list[str]], None], work: Path) -> None:
    with pytest.raises(UserError, match="dataset.language en, and the settings now say de; run prepare_dataset.py"):
        main(words(work, "--dataset.language", "de"))


def test_what_changed_is_named_with_the_step_to_run(work: Path) -> None:
    with pytest.raises(UserError, match="doc2vec.epochs 40, and the settings now say 3; run train_doc2vec.py"):
        extract_doc2vec_vectors.main(words(work, "--doc2vec.epochs", "3"))
    (work / "doc2vec" / "vocabulary.txt").write_text("<pad>\n<start>\n<end>\n")
    with pytest.raises(UserError, match=r"damaged \(vocabulary.txt .*\); run train_doc2vec.py"):
        knn_document_features.main(words(work))


def test_a_new_model_calls_for_step_2(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = words(work, "--doc2vec.inference_epochs", "3")
    train_doc2vec.main(more)
    with pytest.raises(UserError, match="inference_epochs None, and the settings now say 3; run extract_doc2vec"):
        knn_document_features.main(more)
    extract_doc2vec_vectors.main(more)
    knn_document_features.main(more)
    assert capsys.readouterr().out.count("making it anew") == 3


# Mistakes


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_pairs(script: str, tmp_path: Path) -> None:
    message = one_line_error(run_script(script, "--work", tmp_path, ok=False))
    assert "pairs.parquet" in message and "prepare_dataset.py" in message


@pytest.mark.parametrize("main", MAINS)
def test_help(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help-all"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "--config FILE.yaml" in shown and "--neighbors.min_recall" in shown


def test_wrong_key() -> None:
    message = one_line_error(run_script(SCRIPTS[0], "--doc2vec.epohcs", "3", ok=False))
    assert "epohcs" in message and "doc2vec.epochs" in message


def test_steps_out_of_order(tmp_path: Path) -> None:
    work = tmp_path / "work"
    prepare(work)
    for main in MAINS[1:]:
        with pytest.raises(UserError, match="run train_doc2vec.py"):
            main(words(work))
    train_doc2vec.main(words(work))
    with pytest.raises(UserError, match="run extract_doc2vec_vectors.py"):
        knn_document_features.main(words(work))


def test_empty_vocabulary(tmp_path: Path) -> None:
    work = tmp_path / "work"
    prepare(work)
    with pytest.raises(UserError, match=r"doc2vec.min_count = 500 times, the most frequent \d+ times; lower"):
        train_doc2vec.main(words(work, "--doc2vec.min_count", "500"))
    assert not (work / "doc2vec").exists()


def test_no_train_texts(tmp_path: Path) -> None:
    work = tmp_path / "work"
    prepare(work, [{**row, "split": "test"} for row in pair_rows()])
    with pytest.raises(UserError, match="no text of the train split; run prepare_dataset.py"):
        train_doc2vec.main(words(work))


def test_language_without_stop_words_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    settings = Settings(work=str(work), dataset=Dataset(source="manifest", manifest="m", language="xx"))
    prepare(work)
    with making(PREPARE, settings):
        pass
    train_doc2vec.main(words(work, "--dataset.language", "xx"))
    assert "no stop words are known for language xx: none are dropped" in capsys.readouterr().out
