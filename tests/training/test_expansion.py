"""Neighbor expansion against a plain loop over its equation, and what must never be a neighbor."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_script

import encode
import evaluate
import export_run
import search
import train_cross_modal_retrieval_model as training
from datasets import Prepared
from models import TwoStream, build_model
from pipeline.errors import UserError
from pipeline.pairs import SPLITS, read_pairs
from pipeline.schema import Settings
from pipeline.settings import load_settings, mistakes, replaced
from pipeline.work import Work
from reporting.compared_runs import ComparedRuns
from reporting.figures import RunScores, read_figures
from reporting.retrieval_index import open_index
from training.embedding import embed_pairs
from training.encoder import RunEncoder
from training.expansion import SPARE, Expander, embed_split, nearest_places
from training.image_sources import features_path, image_source, pretrained_features
from training.text_streams import load_pairs

CPU = torch.device("cpu")
W, K = 0.7, 4


class World:
    """The tiny dataset and a model that was never trained."""

    def __init__(self, work: Path) -> None:
        self.settings: Settings = load_settings(
            TINY[1], {"work": str(work), "evaluation.expand": W, "evaluation.expand_neighbors": K}
        )
        model = self.settings.model
        self.data: Prepared = load_pairs(work, self.settings.features_folder, model.text, CPU)
        self.model: TwoStream = build_model(model, np.load(Work(work).word_vectors), seed=0).eval()
        self.source = image_source(self.settings, self.data, CPU)
        self.features = pretrained_features(self.settings, self.data.images, CPU)[0].array[:, 0]
        self.omega = np.load(Work(work).vectors)
        rows = np.sort(np.concatenate([self.data.rows[split] for split in SPLITS]))
        x, y = embed_pairs(self.model, self.data, self.source, rows, 64, "float32", CPU)
        self.x, self.y = (
            dict(zip(rows.tolist(), x.numpy(), strict=True)),
            dict(zip(rows.tolist(), y.numpy(), strict=True)),
        )

    def expander(self) -> Expander:
        return Expander(self.model, self.data, self.source, self.settings, CPU)

    def words(self, row: int) -> tuple[int, ...]:
        return tuple(self.data.tokens[self.data.offsets[row] : self.data.offsets[row + 1]].tolist())

    def by_hand(self, row: int, kind: str) -> np.ndarray:
        """x̂ or ŷ of a pair of this dataset, in which every pair has an image of its own."""
        space, own, other = {
            "images": (lambda pair: self.features[self.data.images.of_pair[pair]], self.x, self.y),
            "texts": (lambda pair: self.omega[pair], self.y, self.x),
        }[kind]
        is_train = row in self.data.rows["train"]
        cosines = []
        for pair in self.data.rows["train"].tolist():
            if is_train and (
                self.data.image_ids[pair] == self.data.image_ids[row] or self.words(pair) == self.words(row)
            ):
                continue
            a, b = space(row).astype(np.float64), space(pair).astype(np.float64)
            cosines.append((-(a @ b) / np.linalg.norm(a) / np.linalg.norm(b), pair))
        mean = np.mean([other[pair] for _, pair in sorted(cosines)[:K]], axis=0)
        moved = own[row] + W * mean / np.linalg.norm(mean)
        return moved / np.linalg.norm(moved)


@pytest.fixture(scope="module")
def world(prepared_once: Path) -> World:
    return World(prepared_once)


@pytest.mark.parametrize("split", SPLITS)
def test_expansion_is_a_loop_over_its_equation(world: World, split: str) -> None:
    rows = world.data.rows[split]
    expander = world.expander()
    x, y = (
        torch.from_numpy(np.stack([world.x[row] for row in rows])),
        torch.from_numpy(np.stack([world.y[row] for row in rows])),
    )
    of_images = expander.images(x, world.data.images.of_pair[rows]).numpy()
    of_texts = expander.texts(y, rows).numpy()
    for place, row in enumerate(rows.tolist()):
        np.testing.assert_allclose(of_images[place], world.by_hand(row, "images"), atol=1e-5)
        np.testing.assert_allclose(of_texts[place], world.by_hand(row, "texts"), atol=1e-5)
    again = world.expander()
    assert torch.equal(again.images(x, world.data.images.of_pair[rows]), torch.from_numpy(of_images))
    assert torch.equal(again.texts(y, rows), torch.from_numpy(of_texts))


def test_weight_zero_changes_no_bit_and_the_split_is_expanded(world: World) -> None:
    plain = world.settings.model_copy(deep=True)
    plain.evaluation.expand = 0.0
    rows = world.data.rows["test"]
    x, y = embed_pairs(world.model, world.data, world.source, rows, plain.evaluation.batch_size, "float32", CPU)
    for found, expected in zip(embed_split(world.model, world.data, plain, CPU), (x, y), strict=True):
        assert torch.equal(found, expected)
    of_split = embed_split(world.model, world.data, world.settings, CPU)
    assert torch.equal(of_split[0], world.expander().images(x, world.data.images.of_pair[rows]))
    assert torch.equal(of_split[1], world.expander().texts(y, rows))
    assert not torch.allclose(of_split[0], x, atol=1e-2)


def test_no_pair_of_val_or_test_is_ever_a_neighbor(world: World) -> None:
    """A test pair that equals the query in both spaces: whatever its embeddings are, the query's stay."""
    test, val = world.data.rows["test"], world.data.rows["val"]
    query = test[:1]
    numbers = world.data.images.of_pair
    results = []
    for changes in (False, True):
        expander = world.expander()
        expander.omega = np.array(expander.omega)
        features = expander.features.array.copy()
        for planted in (test[1], val[0]):
            expander.omega[planted] = expander.omega[query[0]]
            features[numbers[planted]] = features[numbers[query[0]]]
            if changes:
                expander.omega[planted] *= -3
                features[numbers[planted]] = 1e3
        expander.features = features
        x, y = (torch.from_numpy(of[int(query[0])])[None] for of in (world.x, world.y))
        results.append((expander.images(x, numbers[query]), expander.texts(y, query)))
        asked = np.concatenate([np.flatnonzero(of.is_known[:-1]) for of in (expander.of_images, expander.of_texts)])
        assert len(asked) == 2 * K and np.isin(expander.rows[asked], world.data.rows["train"]).all()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    np.testing.assert_allclose(results[0][0][0], world.by_hand(int(query[0]), "images"), atol=1e-5)


def test_a_train_pair_leaves_out_itself_its_image_and_texts_of_the_same_words(world: World) -> None:
    train = world.data.rows["train"]
    row, same_image, same_words, near = train[:4]
    data = world.data
    expander = world.expander()
    expander.data = Prepared(**{**vars(data), "image_ids": data.image_ids.copy()})
    expander.data.image_ids[same_image] = data.image_ids[row]
    expander.words[same_words] = expander.words[row]
    expander.omega, expander.features = np.array(expander.omega), expander.features.array.copy()
    for pair in (same_image, same_words, near):  # nearest of all in both spaces
        expander.omega[pair] = expander.omega[row]
        expander.features[data.images.of_pair[pair]] = expander.features[data.images.of_pair[row]]
    expander.k = 1
    x, y = torch.from_numpy(world.x[row])[None], torch.from_numpy(world.y[row])[None]
    expander.images(x, data.images.of_pair[[row]])
    expander.texts(y, np.array([row]))
    for of in (expander.of_texts, expander.of_images):
        assert expander.rows[of.is_known[:-1]].tolist() == [near]
    # A new item, the same in every respect, leaves out nothing.
    fresh = world.expander()
    fresh.k = 1
    fresh.new_texts(y, fresh.omega[[row]])
    assert fresh.rows[fresh.of_images.is_known[:-1]].tolist() == [row]


def test_nothing_near_leaves_an_embedding_as_it_is(world: World) -> None:
    expander = world.expander()
    y = torch.from_numpy(np.stack(list(world.y.values())[:2]))
    assert torch.equal(expander.new_texts(y, np.zeros((2, expander.omega.shape[1]), np.float32)), y)
    broken = np.full((2, expander.features.shape[2]), np.nan, np.float32)
    assert torch.equal(expander.new_images(y, broken), y)


@pytest.mark.parametrize("count", [1, 5, 200, 5000])
def test_nearest_places_is_a_sort_of_all(count: int) -> None:
    rng = np.random.default_rng(count)
    vectors = rng.normal(size=(count, 6)).astype(np.float32)
    vectors[rng.integers(count, size=min(count // 2, SPARE))] = vectors[0]  # ties
    queries = np.concatenate([vectors[:3], rng.normal(size=(30, 6)).astype(np.float32)])
    labels, own = rng.integers(0, 4, size=count), rng.integers(-1, 4, size=(len(queries), 2))
    own[3:, 1] = -1
    found = nearest_places(queries, lambda places: vectors[places], count, 7, [(own, labels)], CPU)
    for line, query in enumerate(queries.astype(np.float64)):
        lengths = [np.sqrt((vector.astype(np.float64) ** 2).sum()) for vector in vectors]
        cosines = [
            (vector.astype(np.float64) * query).sum() / length for vector, length in zip(vectors, lengths, strict=True)
        ]
        order = sorted(
            (-round(cosine, 9), place) for place, cosine in enumerate(cosines) if labels[place] not in own[line]
        )
        expected = [place for _, place in order[:7]]
        assert found[line].tolist() == expected + [-1] * (7 - len(expected))


def test_pvse_is_refused_before_anything_is_computed() -> None:
    settings = load_settings({"evaluation.expand": 0.5, "model.pvse.embeddings": 2})
    assert [mistake for mistake in mistakes(settings) if mistake.startswith("evaluation.expand")] == [
        "evaluation.expand must be 0 with model.pvse.embeddings: it moves one embedding an item"
    ]
    assert not mistakes(load_settings({"evaluation.expand": 0.5}))


def test_features_that_training_did_not_need_are_asked_for(prepared: Path) -> None:
    settings = load_settings(TINY[1], {"work": str(prepared), "model.image.trainable": True})
    data = load_pairs(prepared, settings.features_folder, settings.model.text, CPU)
    pretrained_features(settings, data.images, CPU)
    shutil.rmtree(features_path(settings).parent)
    with pytest.raises(UserError, match="run extract_image_features.py with the run's settings"):
        pretrained_features(settings, data.images, CPU)


@pytest.fixture(scope="module")
def run(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run in a WORK of its own."""
    work = tmp_path_factory.mktemp("expanded") / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    return training.main(["1", "0", "0", *TINY, "--work", str(work), "--training.max_epochs", "1"])


def test_evaluate_measures_expanded_embeddings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--run", str(run)])
    plain = json.loads((run / "metrics.json").read_text())
    assert "expand" not in plain
    expand = ["--evaluation.expand", "0.5", "--evaluation.expand_neighbors", "3"]
    run_script("evaluate.py", "--run", run, *expand)
    moved = json.loads((run / "metrics.json").read_text())
    assert (moved["expand"], moved["expand_neighbors"]) == (0.5, 3)
    assert moved["figures"] != plain["figures"]
    (report,) = ComparedRuns([RunEncoder(run, "cpu")]).embeddings
    settings = replaced(RunEncoder(run, "cpu").settings, {"evaluation.expand": 0.5, "evaluation.expand_neighbors": 3})
    data = load_pairs(settings.work_folder, settings.features_folder, settings.model.text, CPU)
    for found, expected in zip(report, embed_split(RunEncoder(run, "cpu").model, data, settings, CPU), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
    capsys.readouterr()
    evaluate.main(["--run", str(run), *expand])
    assert f"up to date {run / 'metrics.json'}" in capsys.readouterr().out
    evaluate.main(["--run", str(run), "--evaluation.split", "val", *expand])
    assert json.loads((run / "metrics.json").read_text())["split"] == "val"
    evaluate.main(["--run", str(run)])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    evaluate.main(["--run", str(run), *expand, "--name", "moved"])
    named = run / "evaluations" / "moved"
    assert read_figures(named) == moved["figures"] and read_figures(run) == plain["figures"]
    assert RunScores(named).of_metric.keys() == RunScores(run).of_metric.keys()
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and named not in path.parents}
    assert after == before  # TensorBoard's pages of the run too
    (named / "metrics.json").write_text((named / "metrics.json").read_text().replace("0.", "0.1", 1))
    with pytest.raises(UserError, match="damaged"):
        read_figures(named)
    assert json.loads((run / "metrics.json").read_text()) == plain


def test_new_texts_and_images_are_where_the_index_has_them(run: Path, tmp_path: Path) -> None:
    encoder = RunEncoder(run, "cpu", expand=0.5)
    index, settings = open_index(encoder), encoder.settings
    data = load_pairs(settings.work_folder, settings.features_folder, settings.model.text, CPU)
    rows = data.rows["test"]
    table = read_pairs(settings.work_folder).take(rows)
    texts = table["text"].to_pylist()
    paths = [index.files.root / path for path in table["image_path"].to_pylist()]
    of_index = {
        kind: index.items(kind).vectors[np.searchsorted(index.items(kind).pairs, rows)] for kind in ("images", "texts")
    }
    for kind, expected in zip(("images", "texts"), embed_split(encoder.model, data, settings, CPU), strict=True):
        np.testing.assert_allclose(of_index[kind], expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(encoder.texts(texts)[0], of_index["texts"], atol=1e-5)
    np.testing.assert_allclose(encoder.images(paths)[0], of_index["images"], atol=1e-5)
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    for expand in (["--expand", "0.5"], []):
        encode.main(
            ["--run", str(run), "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "y.npy"), *expand]
        )
        is_same = np.allclose(np.load(tmp_path / "y.npy"), of_index["texts"], atol=1e-5)
        assert is_same == bool(expand)
    open_index(RunEncoder(run, "cpu"))
    assert not np.allclose(np.load(run / "index" / "texts.npy")[rows], of_index["texts"], atol=1e-3)
    # A backbone that is trained, here for no step: pixels are read, and the pretrained backbone is built beside it.
    other = RunEncoder(run, "cpu", expand=0.5)
    other.settings.model.image.trainable = True
    np.testing.assert_allclose(other.images(paths)[0], of_index["images"], atol=1e-4)
    np.testing.assert_allclose(other.texts(texts)[0], of_index["texts"], atol=1e-4)


def test_search_expands_the_query_and_the_index(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = RunEncoder(run, "cpu", expand=2.0)
    text = read_pairs(encoder.settings.work_folder)["text"][0].as_py()
    search.main(["--run", str(run), "--expand", "2", "--json", "--top", "1", text])
    (first,) = json.loads(capsys.readouterr().out)["images"]
    index = open_index(encoder)
    image = index.images.vectors[np.searchsorted(index.images.pairs, first["pair"])]
    assert first["score"] == pytest.approx(float(image @ encoder.texts([text])[0][0]), abs=1e-5)


def test_without_train_pairs_expansion_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run.main(["--run", str(run), "--out", str(tmp_path / "run.zip")])
    shutil.copytree(run, tmp_path / "runs" / "run")
    (tmp_path / "texts.txt").write_text("a text")
    for place, what in (
        (tmp_path / "run.zip", "is an exported run"),
        (tmp_path / "runs" / "run", "is not in its WORK"),
    ):
        words = ["--run", str(place), "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "y.npy")]
        with pytest.raises(UserError, match=f"needs the train pairs in WORK, and {place} {what}; take --expand 0"):
            encode.main([*words, "--expand", "0.5"])
        with pytest.raises(UserError, match=f"needs the train pairs in WORK, and {place} {what}"):
            search.main(["--run", str(place), "--expand", "0.5", "word"])
    for value in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match="evaluation.expand is .* and must be"):
            search.main(["--run", str(run), "--expand", value, "word"])
    for name in ("gensim", "gensim.models"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "text_space.doc2vec", raising=False)
    with pytest.raises(UserError, match="with the package gensim; install it with pip install -r requirements.txt"):
        RunEncoder(run, "cpu", expand=0.5).texts([read_pairs(run.parents[1])["text"][0].as_py()])
