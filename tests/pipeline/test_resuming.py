"""Steps 0 to 3 that are stopped go on where they were, to the files that they would have written anyway."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_steps_1_to_3 import MAINS, STEPS, prepare, settings_of, words

import extract_doc2vec_vectors
import prepare_dataset
import train_doc2vec
from images import files as images
from pipeline.files import read_json
from pipeline.schema import Neighbors as NeighborSettings
from pipeline.schema import Settings
from pipeline.steps import output_paths
from text_space import doc2vec, inference, near_duplicates, neighbors
from text_space.tokenizer import Tokenizer


class Stopped(Exception):
    """In place of the power cut."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORK after steps 1 to 3 that nothing stopped; not to be changed."""
    work = tmp_path_factory.mktemp("finished") / "work"
    prepare(work)
    for main in MAINS:
        main(words(work))
    return work


def files(work: Path, step: int) -> list[bytes]:
    return [path.read_bytes() for path in output_paths(STEPS[step], settings_of(work))]


def after(finished: Path, tmp_path: Path, step: int) -> Path:
    """WORK in which the steps before `step` are done."""
    work = tmp_path / "work"
    prepare(work)
    for main in MAINS[:step]:
        main(words(work))
    return work


@pytest.mark.slow
def test_training_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = after(finished, tmp_path, 0)
    monkeypatch.setattr(doc2vec, "SAVE_EVERY", 0.0)
    epochs: list[int] = []
    untouched = doc2vec.train

    def until_the_12th(corpus: Path, settings: Any, seed: int, workers: int, on_epoch: Any, unfinished: Path) -> Any:
        def count() -> None:
            epochs.append(1)
            if len(epochs) == 12:
                raise Stopped

        return untouched(corpus, settings, seed, workers, count, unfinished)

    monkeypatch.setattr(doc2vec, "train", until_the_12th)
    with pytest.raises(Stopped):
        train_doc2vec.main(words(work))
    (folder,) = (work / ".unfinished").iterdir()
    assert read_json(folder / "epoch.json") == 12
    assert sorted(path.name for path in folder.glob("epoch-*")) == ["epoch-12.model", "epoch-12.npy"]
    monkeypatch.setattr(doc2vec, "untrained", None)  # not a second time
    monkeypatch.setattr(doc2vec, "train", untouched)
    train_doc2vec.main(words(work))
    assert files(work, 0) == files(finished, 0)
    for main in MAINS[1:]:
        main(words(work))
    assert files(work, 1) == files(finished, 1) and files(work, 2) == files(finished, 2)
    assert not (work / ".unfinished").exists()


def test_the_corpus_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc2vec, "TEXTS_AT_A_TIME", 10)
    tokenizer = Tokenizer(Settings().text, Settings().dataset.language, {"language": "en"})
    texts = [f"word{number} another" if number % 7 else "..." for number in range(95)]

    def until(stop: int) -> Iterator[str]:
        for number, text in enumerate(texts):
            if number == stop:
                raise Stopped
            yield text

    whole, parts = tmp_path / "whole.txt", tmp_path / "parts.txt"
    tokenizer.max_sentences = None
    lines = doc2vec.write_corpus(texts, tokenizer, whole)
    for stop in (25, 61):
        with pytest.raises(Stopped):
            doc2vec.write_corpus(until(stop), tokenizer, parts, resume=True)
        with parts.open("a") as file:
            file.write("half a li")  # the stop came while it was writing
    assert json.loads(parts.with_suffix(".json").read_text())["texts"] == 60
    assert doc2vec.write_corpus(texts, tokenizer, parts, resume=True) == lines
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("skip", [0, 1, 30, 49, 50, 119, 120, 500])
@pytest.mark.parametrize("split", [None, "val"])
def test_texts_are_skipped_from_anywhere(finished: Path, skip: int, split: str | None) -> None:
    texts = [text for batch in doc2vec.text_batches(finished, split) for text in batch]
    rest = [text for batch in doc2vec.text_batches(finished, split, size=50, skip=skip) for text in batch]
    assert rest == texts[skip:]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [False, True])
def test_vectors_go_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool) -> None:
    work = after(finished, tmp_path, 1)
    untouched, embedded = inference.embed_batches, []

    def counted(settings: Settings, batches: Iterator[list[str]], processes: int, folder: Path) -> Iterator[Any]:
        for batch in untouched(settings, batches, processes, folder):
            embedded.append(len(batch.vectors))
            yield batch
            if stops and len(embedded) == 2:
                raise Stopped

    monkeypatch.setattr(inference, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(inference, "embed_batches", counted)
    small = lambda work, skip: doc2vec.text_batches(work, size=50, skip=skip)  # noqa: E731
    monkeypatch.setattr(inference, "text_batches", small)
    stops = True
    with pytest.raises(Stopped):
        extract_doc2vec_vectors.main(words(work))
    stops = False
    embedded.clear()
    if changed:  # then nothing of what was done may be used
        train_doc2vec.main(words(work, "--doc2vec.inference_epochs", "3"))
        extract_doc2vec_vectors.main(words(work, "--doc2vec.inference_epochs", "3"))
        assert sum(embedded) == 120
        assert files(work, 1)[0] != files(finished, 1)[0]
    else:
        extract_doc2vec_vectors.main(words(work))
        assert sum(embedded) == 20
        assert files(work, 1) == files(finished, 1)


def test_neighbors_go_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "ROWS_AT_A_TIME", 20)
    folder, points = tmp_path / "unfinished", np.random.default_rng(0).random((300, 8), dtype=np.float32)
    folder.mkdir()
    chosen = settings_of(finished).neighbors
    chosen.method, chosen.k, chosen.recall_sample = "hnsw", 5, 30
    groups = (np.arange(300) // 3,)
    wanted, figures = neighbors.find_neighbors(points, groups, chosen, 0, True)
    untouched, asked = neighbors.GraphSearch.neighbors, []

    def counted(self: neighbors.GraphSearch, rows: np.ndarray) -> neighbors.NeighborLists:
        asked.append(rows)
        if len(asked) == stop:
            raise Stopped
        return untouched(self, rows)

    monkeypatch.setattr(neighbors.GraphSearch, "neighbors", counted)
    stop = 9
    with pytest.raises(Stopped):
        neighbors.find_neighbors(points, groups, chosen, 0, True, folder)
    done = read_json(folder / "done.json")
    assert 0 < done < 300 and done % 20 == 0
    asked.clear()
    stop = -1
    monkeypatch.setattr(neighbors.GraphSearch, "raise_effort", None)  # efSearch is not looked for a second time
    found, again = neighbors.find_neighbors(points, groups, chosen, 0, True, folder)
    assert again["searched_rows"] == 300 - done and asked[0][0] == done
    assert again["ef_search"] == figures["ef_search"] and again["recall"] == figures["recall"]
    assert np.array_equal(found.positions, wanted.positions) and np.array_equal(found.distances, wanted.distances)


def test_a_graph_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while the graph is built leaves nothing that a second call would trip over."""
    points, chosen = np.random.default_rng(0).random((300, 8), dtype=np.float32), NeighborSettings(k=5, method="hnsw")
    wanted, _ = neighbors.find_neighbors(points, (), chosen, 0, True)

    def killed(*arguments: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(neighbors.GraphSearch, "raise_effort", killed)
        with pytest.raises(Stopped):
            neighbors.find_neighbors(points, (), chosen, 0, True, tmp_path)
    found, figures = neighbors.find_neighbors(points, (), chosen, 0, True, tmp_path)
    assert figures["searched_rows"] == 300
    assert np.array_equal(found.positions, wanted.positions) and np.array_equal(found.distances, wanted.distances)


@pytest.mark.slow
def test_signatures_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "TEXTS_AT_A_TIME", 40)
    texts = [f"some words of text number {number % 150} and more" if number % 11 else "!" for number in range(200)]
    wanted = near_duplicates.signatures(texts, 200)

    def until(stop: int) -> Iterator[str]:
        for number, text in enumerate(texts):
            if number == stop:
                raise Stopped
            yield text

    with pytest.raises(Stopped):
        near_duplicates.signatures(until(190), 200, "en", tmp_path)
    done = read_json(tmp_path / "signatures.json") if (tmp_path / "signatures.json").exists() else 0
    monkeypatch.setattr(near_duplicates, "cores", lambda: 0)  # in this process
    for stop in (130, 200):
        try:
            values, has_words = near_duplicates.signatures(until(stop), 200, "en", tmp_path)
        except Stopped:
            assert read_json(tmp_path / "signatures.json") == max(done, 120)
    assert np.array_equal(values, wanted[0]) and np.array_equal(has_words, wanted[1])


def test_checks_of_images_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.png" for number in range(400)]
    for number, name in enumerate(names):
        Image.new("L", (4, 4)).save(tmp_path / name)
        if number % 40 == 0:
            (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(images, "IMAGES_AT_A_TIME", 100)
    wanted = images.check_images(tmp_path, names)
    checked = tmp_path / "images.jsonl"
    images.check_images(tmp_path, names[:300], checked=checked)
    with checked.open("a") as file:
        file.write('[100, [["300.png"')  # the stop came while it was writing
    shutil.move(tmp_path / "7.png", tmp_path / "gone.png")  # what was checked is not looked at again
    found = images.check_images(tmp_path, names, checked=checked)
    assert {name: str(error) for name, error in found.items()} == {name: str(error) for name, error in wanted.items()}
    assert len(checked.read_text().splitlines()) == 4


@pytest.mark.slow
def test_preparation_that_was_stopped_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for number in range(12):
        Image.new("L", (4, 4)).save(tmp_path / "data" / f"{number}.png")
    lines = [json.dumps({"image": f"{n}.png", "text": f"text{n} a{n} b{n}"}) for n in range(12)]
    (tmp_path / "data" / "pairs.jsonl").write_text("\n".join(lines))
    command = ["--dataset.source", "manifest", "--dataset.manifest", str(tmp_path / "data" / "pairs.jsonl")]
    command += ["--work", str(tmp_path / "work")]

    def stop(*arguments: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(prepare_dataset, "repeated_rows", stop)
        with pytest.raises(Stopped):
            prepare_dataset.main(command)
    prepare_dataset.main([*command, "--seed", "1"])
    assert "going on" not in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(prepare_dataset, "repeated_rows", stop)
        with pytest.raises(Stopped):
            prepare_dataset.main(command)
    prepare_dataset.main(command)
    assert "resuming prepare_dataset.py where it was stopped" in capsys.readouterr().out
    assert not (tmp_path / "work" / ".unfinished").exists()
