"""neighbors.space both against a plain loop over its definition, in pieces, resumed, and from the command line."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, one_line_error, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import extract_doc2vec_vectors
import extract_image_features
import knn_document_features
import prepare_dataset
import train_doc2vec
from pipeline import registry
from pipeline.errors import UserError
from pipeline.files import read_array
from pipeline.pairs import read_pairs
from pipeline.schema import Neighbors, Settings
from pipeline.steps import EXTRACT_DOC2VEC, EXTRACT_IMAGES, stamp_path
from pipeline.work import Work
from text_space import neighbors, points, spaces
from text_space.neighbors import NeighborLists, find_neighbors, recall
from text_space.points import cosine_moments, on_sphere


def z_scores(vectors: np.ndarray) -> np.ndarray:
    """(n, n) standardised cosines, the slow way; nan on the diagonal."""
    found = np.full((len(vectors), len(vectors)), np.nan)
    lengths = [max(float(np.linalg.norm(vector.astype(np.float64))), 1e-300) for vector in vectors]
    for i, a in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i]
        cosines = [float(a.astype(np.float64) @ vectors[j]) / lengths[i] / lengths[j] for j in others]
        deviation = np.std(cosines) if cosines else 0
        for j, cosine in zip(others, cosines, strict=True):
            found[i, j] = (cosine - np.mean(cosines)) / deviation if deviation > 1e-9 else 0
    return found


def assert_both(
    found: NeighborLists,
    texts: np.ndarray,
    images: np.ndarray,
    k: int,
    groups: Sequence[np.ndarray] = (),
    tolerance: float = 2e-5,
) -> None:
    """Each list is one of the k highest sums, of those allowed, from the highest; the distances are minus the sums."""
    sums = z_scores(texts) + z_scores(images)
    for i in range(len(texts)):
        allowed = [j for j in range(len(texts)) if j != i and all(group[i] != group[j] for group in groups)]
        best = sorted((sums[i, j] for j in allowed), reverse=True)[:k]
        listed = found.positions[i, : len(best)]
        assert len(set(listed)) == len(listed) and set(listed) <= set(allowed)
        np.testing.assert_allclose(-found.distances[i, : len(best)], best, atol=tolerance)
        np.testing.assert_allclose(sums[i, listed], best, atol=tolerance)
        assert (np.diff(found.distances[i, : len(best)]) >= 0).all()
        assert (found.positions[i, len(best) :] == -1).all() and np.isinf(found.distances[i, len(best) :]).all()


def both(texts: np.ndarray, images: np.ndarray, k: int, groups: Sequence[np.ndarray] = ()) -> NeighborLists:
    found, how = find_neighbors(texts, groups, Neighbors(k=k), 0, True, images=images)
    assert how == {"method": "exact"}
    return found


def topics(rows: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of texts and of images with features above 0, both of 20 topics."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 20, rows)
    texts = rng.normal(size=(20, 12))[topic] + rng.normal(size=(rows, 12))
    images = np.maximum(rng.normal(size=(20, 30))[topic] + rng.normal(size=(rows, 30)), 0)
    return texts.astype(np.float32), images.astype(np.float32)


@settings(deadline=None)
@given(
    # A coarse grid: many vectors coincide or are zero, and many sums are equal.
    arrays(np.int8, st.tuples(st.integers(1, 25), st.just(4)), elements=st.integers(-2, 2)),
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(1, 25),
)
def test_both_is_the_plain_loop(grid: np.ndarray, k: int, some_images: int, some_texts: int) -> None:
    texts, images = grid[:, :2].astype(np.float32), grid[:, 2:].astype(np.float32)
    groups = (np.arange(len(grid)) % some_images, np.arange(len(grid)) % some_texts)
    assert_both(both(texts, images, k, groups), texts, images, k, groups)
    assert_both(both(texts, images, k), texts, images, k)


def test_both_weighs_the_spaces_alike_whatever_their_lengths_and_spreads() -> None:
    texts, images = topics(150)
    images = 1000 * images + 5000  # cosines near 1, hardly apart: float32 shows
    found = both(texts, images, 7, (np.arange(150) // 2,))
    assert_both(found, texts, images, 7, (np.arange(150) // 2,), 2e-4)
    alone = [
        find_neighbors(one, (), Neighbors(k=7, distance="cosine", method="exact"), 0, True)[0]
        for one in (texts, images)
    ]
    for one in alone:
        assert (one.positions != found.positions).any()


def test_ties_and_rows_without_spread() -> None:
    """Of equal sums the lower position comes first. A row whose cosines are all the same in a space has z 0 there."""
    texts, images = topics(40)
    texts[10:14], images[10:14] = texts[10], images[10]
    texts[20], images[30] = 0, 0
    texts[25], images[25] = 0, 0
    found = both(texts, images, 5)
    assert found.positions[12, :3].tolist() == [10, 11, 13] and found.positions[10, :3].tolist() == [11, 12, 13]
    assert found.positions[25].tolist() == [0, 1, 2, 3, 4] and (found.distances[25] == 0).all()
    assert_both(found, texts, images, 5)
    same = both(np.ones((6, 3), dtype=np.float32), np.full((6, 2), 0.3, dtype=np.float32), 5)
    assert same.positions[0].tolist() == [1, 2, 3, 4, 5] and (same.distances == 0).all()
    by_image = both(np.ones((40, 3), dtype=np.float32) / 3, images, 39)
    assert_both(by_image, np.ones((40, 3), dtype=np.float32), images, 39)


def test_few_rows() -> None:
    texts, images = topics(3)
    found = both(texts, images, 4)
    assert (found.positions[:, 2:] == -1).all() and np.isinf(found.distances[:, 2:]).all()
    assert_both(found, texts, images, 4)
    assert both(texts[:2], images[:2], 1).positions.tolist() == [[1], [0]]
    assert both(texts[:1], images[:1], 1).positions.tolist() == [[-1]]
    assert (both(texts, images, 2, (np.zeros(3, dtype=np.int64),)).positions == -1).all()


def test_moments_are_those_of_all_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "ROWS_AT_A_TIME", 7)
    unit = on_sphere(topics(50)[0])
    cosines = unit.astype(np.float64) @ unit.T
    others = [np.delete(cosines[row], row) for row in range(50)]
    means, deviations = cosine_moments(unit)
    np.testing.assert_allclose(means, [row.mean() for row in others], atol=1e-12)
    np.testing.assert_allclose(deviations, [row.std() for row in others], atol=1e-12)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts, images = topics(90)
    whole = both(texts, images, 6)
    monkeypatch.setattr(points, "ROWS_AT_A_TIME", 20)
    monkeypatch.setattr(neighbors, "ROWS_AT_A_TIME", 20)
    parts, _ = find_neighbors(texts, (), Neighbors(k=6), 0, True, tmp_path, images)
    np.testing.assert_array_equal(parts.positions, whole.positions)
    np.testing.assert_allclose(parts.distances, whole.distances, atol=1e-5)


def test_a_stopped_search_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(neighbors, "ROWS_AT_A_TIME", 20)
    texts, images = topics(90)
    wanted, calls, whole = both(texts, images, 6), [], neighbors.exact_neighbors

    def stopping(*arguments: object, **named: object) -> NeighborLists:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(neighbors, "exact_neighbors", stopping)
    with pytest.raises(KeyboardInterrupt):
        find_neighbors(texts, (), Neighbors(k=6), 0, True, tmp_path, images)
    found, _ = find_neighbors(texts, (), Neighbors(k=6), 0, True, tmp_path, images)
    assert len(calls) == 2 + 1 + 3
    np.testing.assert_array_equal(found.positions, wanted.positions)
    np.testing.assert_array_equal(found.distances, wanted.distances)


@pytest.mark.parametrize("library", ["nmslib", "faiss"])
def test_above_the_size_of_exact_search_hnsw_finds_them(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    texts, images = topics()
    groups = (np.arange(600) // 3,)
    truth = both(texts, images, 10, groups)
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 599)
    chosen = Neighbors(k=10, library=library, min_recall=1.0, hnsw_m=32)
    found, how = find_neighbors(texts, groups, chosen, 0, True, images=images)
    assert how["method"] == "hnsw" and how["recall"] == 1
    np.testing.assert_array_equal(found.positions, truth.positions)
    np.testing.assert_allclose(found.distances, truth.distances, atol=1e-5)
    poor = Neighbors(k=10, library=library, min_recall=0.9, hnsw_m=4, hnsw_ef_construction=20)
    some, how = find_neighbors(texts, groups, poor, 0, True, images=images)
    assert how["recall"] >= 0.9 and recall(some, truth) > 0.88
    assert (some.positions // 3 != np.arange(600)[:, None] // 3).all()
    again, _ = find_neighbors(texts, groups, poor, 0, True, images=images)
    np.testing.assert_array_equal(some.positions, again.positions)


# From the command line


@pytest.fixture(scope="module")
def planted(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """WORK after steps 0 to 2, and its flags: every val and test item has the text and the picture of a train item."""
    folder = tmp_path_factory.mktemp("planted")
    table = read_pairs(prepared_once, ["image_path", "text"]).to_pylist()
    root = next(path.parent for path in prepared_once.rglob("*.png")).parent
    (folder / "images").mkdir()
    rows = []
    for number in range(75):
        of = table[number % 60]
        split = "train" if number < 60 else "test" if number % 2 else "val"
        (folder / "images" / f"{number}.png").write_bytes((root / of["image_path"]).read_bytes())
        category = f"c{number % 4}"
        rows.append({"image": f"images/{number}.png", "text": of["text"], "split": split, "category": category})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*TINY, "--dataset.source", "manifest", "--dataset.manifest", str(folder / "pairs.jsonl")]
    flags += ["--dataset.root", str(folder), "--dataset.near_duplicates", "false", "--work", str(folder / "work")]
    for step in (prepare_dataset, train_doc2vec, extract_doc2vec_vectors):
        step.main(flags)
    return folder / "work", flags


@pytest.fixture(scope="module")
def with_images(planted: tuple[Path, list[str]]) -> tuple[Path, list[str]]:
    extract_image_features.main([*planted[1], "--neighbors.space", "both"])
    return planted


def test_without_image_features_one_line_names_the_script(planted: tuple[Path, list[str]], tmp_path: Path) -> None:
    work, flags = planted
    shutil.copytree(work, tmp_path / "work", ignore=shutil.ignore_patterns("image_features", "neighbors"))
    with pytest.raises(UserError, match=r"image_features.vectors.npy is not there .*; run extract_image_features.py"):
        knn_document_features.main([*flags, "--work", str(tmp_path / "work"), "--neighbors.space", "both"])


@pytest.mark.parametrize("space", ["doc2vec", "images", "both", "sentences:ENCODER", "file:VECTORS"])
def test_no_test_item_is_a_neighbor_in_any_space(
    with_images: tuple[Path, list[str]], space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted test items are the nearest of all to the train items whose text and picture they have."""
    work, flags = with_images
    texts = read_pairs(work, ["text"])["text"].to_pylist()
    vectors = dict(zip(texts, np.random.default_rng(0).normal(size=(len(texts), 6)), strict=True))
    of_texts = np.array([vectors[text] for text in texts], dtype=np.float32)
    monkeypatch.setattr(spaces, "encoder_folder", lambda named, setting: Path(named))
    monkeypatch.setattr(spaces, "encoder_fingerprint", lambda folder: "of a test")
    monkeypatch.setattr(spaces, "cached_vectors", lambda *_: of_texts)
    if space.startswith("file"):
        np.save(tmp_path / "vectors.npy", of_texts)
        space = f"file:{tmp_path / 'vectors.npy'}"
    knn_document_features.main([*flags, "--neighbors.space", space])
    splits = np.array(read_pairs(work, ["split"])["split"].to_pylist())
    files = Work(work).neighbors(space)
    rows, indices = read_array(files.rows), read_array(files.indices)
    assert (splits[rows] == "train").all() and len(rows) >= 50
    assert (indices >= 0).all() and (splits[indices] == "train").all()
    planted_texts = [text for text, split in zip(texts, splits, strict=True) if split != "train"]
    assert len(planted_texts) == 15 and {*planted_texts} <= {texts[row] for row in rows}


def test_every_space_is_tested_so() -> None:
    tested = ["doc2vec", "images", "both", "sentences", "sentences:ENCODER", "file:VECTORS"]
    assert {registry.SPACES.key(space) for space in tested} == {*registry.SPACES}


def test_step_3_with_both(with_images: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    work, flags = with_images
    flags = [*flags, "--neighbors.space", "both", "--neighbors.k", "6"]
    knn_document_features.main(flags)
    printed = capsys.readouterr().out
    files = Work(work).neighbors("both")
    rows, indices, distances = read_array(files.rows), read_array(files.indices), read_array(files.distances)
    assert files.folder.name == "both" and indices.shape == distances.shape == (len(rows), 6)
    assert f"exact search among {len(rows)} texts\n" in printed and "recall" not in printed
    assert "of the 6 nearest texts have the text's category; by chance" in printed
    settings = Settings(work=str(work))
    assert stamp_path(EXTRACT_DOC2VEC, settings).is_file() and stamp_path(EXTRACT_IMAGES, settings).is_file()
    vectors = read_array(Work(work).vectors)[rows], read_array(Work(work).image_vectors)[rows]
    texts = np.array(read_pairs(work, ["text"])["text"].to_pylist())[rows]
    group = np.unique(texts, return_inverse=True)[1]
    found = NeighborLists(np.searchsorted(rows, indices), distances)
    assert_both(found, *vectors, 6, (group,))
    before = files.distances.read_bytes()
    knn_document_features.main(flags)
    assert f"up to date {files.indices}" in capsys.readouterr().out
    files.rows.unlink()
    knn_document_features.main(flags)
    assert files.distances.read_bytes() == before


def test_new_image_features_make_them_stale(with_images: tuple[Path, list[str]]) -> None:
    work, flags = with_images
    for space in ("both", "doc2vec"):
        knn_document_features.main([*flags, "--neighbors.space", space])
    inputs = json.loads((work / "neighbors" / "both" / "knn_document_features.json").read_text())["inputs"]
    assert {"doc2vec/vectors.npy", "image_features/vectors.npy", "pairs.parquet"} <= inputs.keys()
    inputs = json.loads((work / "neighbors" / "doc2vec" / "knn_document_features.json").read_text())["inputs"]
    assert "image_features/vectors.npy" not in inputs


def test_a_distance_is_not_read(tmp_path: Path) -> None:
    words = ["--work", tmp_path, "--neighbors.space", "both", "--neighbors.distance", "cosine"]
    message = one_line_error(run_script("knn_document_features.py", *words, ok=False))
    assert "neighbors.distance is cosine, which nothing reads: it goes with neighbors.space other than both" in message
