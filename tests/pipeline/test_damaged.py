"""Every artifact cut off, emptied or replaced by garbage: whoever reads it next says in one line what to run again."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

import compare_runs
import evaluate
import extract_doc2vec_vectors
import knn_document_features
import train_cross_modal_retrieval_model as training
import train_doc2vec
from pipeline.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORK with a run that is trained and evaluated; not to be changed."""
    work = tmp_path_factory.mktemp("finished") / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    run = training.main(["1", "0.3", "0.2", *TINY, "--work", str(work)])
    evaluate.main(["--run", str(run)])
    return work


def run_of(work: Path) -> Path:
    (run,) = (work / "runs").iterdir()
    return run


def next_step(main: Callable, *words: str) -> Callable[[Path], object]:
    return lambda work: main([*words, *TINY, "--work", str(work)])


def evaluated(work: Path) -> None:
    evaluate.main(["--run", str(run_of(work)), "--evaluation.bootstrap", "10"])


def resumed(work: Path) -> None:
    (run_of(work) / "run.json").unlink()
    training.main(["1", "0.3", "0.2", *TINY, "--work", str(work), "--resume"])


def compared(work: Path) -> None:
    compare_runs.main([str(run_of(work)), str(run_of(work))])


TRAIN = next_step(training.main, "0", "0.3", "0.2")
ARTIFACTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "prepare_dataset.json": (next_step(train_doc2vec.main), "prepare_dataset.py"),
    "pairs.parquet": (next_step(train_doc2vec.main), "prepare_dataset.py"),
    "doc2vec/train_doc2vec.json": (next_step(extract_doc2vec_vectors.main), "train_doc2vec.py"),
    "doc2vec/model": (next_step(extract_doc2vec_vectors.main), "train_doc2vec.py"),
    "doc2vec/vocabulary.txt": (next_step(extract_doc2vec_vectors.main), "train_doc2vec.py"),
    "doc2vec/punkt.json": (next_step(extract_doc2vec_vectors.main), "train_doc2vec.py"),
    "doc2vec/word_vectors.npy": (TRAIN, ".py"),
    "doc2vec/extract_doc2vec_vectors.json": (next_step(knn_document_features.main), "extract_doc2vec_vectors.py"),
    "doc2vec/vectors.npy": (next_step(knn_document_features.main), "extract_doc2vec_vectors.py"),
    "doc2vec/tokens.npy": (TRAIN, ".py"),
    "doc2vec/offsets.npy": (TRAIN, ".py"),
    "neighbors/doc2vec/knn_document_features.json": (TRAIN, "knn_document_features.py"),
    "neighbors/doc2vec/rows.npy": (TRAIN, "knn_document_features.py"),
    "neighbors/doc2vec/indices.npy": (TRAIN, "knn_document_features.py"),
    "runs/*/config.yaml": (evaluated, "--overwrite"),
    "runs/*/inputs.json": (evaluated, "--overwrite"),
    "runs/*/best.pt": (evaluated, "--overwrite"),
    "runs/*/last.pt": (resumed, "--overwrite"),
    "runs/*/metrics.json": (compared, "evaluate.py"),
}


def damage(path: Path, how: str) -> None:
    """Empty a file, cut it off at a random place, or put garbage of its size or another file in its place."""
    chance = random.Random(f"{path.name} {how}")
    size = path.stat().st_size
    content = path.read_bytes()
    if how == "empty":
        content = b""
    elif how == "another":
        content = b"{}\n"
    elif how == "garbage":
        content = chance.randbytes(size)
    else:
        content = content[: chance.randrange(1, size - 1)]
    path.unlink()  # and not through a link into another's WORK
    path.write_bytes(content)


# Each is cut off at a random place, and has one of the other damages: all of them took four minutes.
# (An inputs.json of another run is told from what it says, not from its form.)
DAMAGES = [
    (name, how)
    for number, name in enumerate(sorted(ARTIFACTS))
    for how in ("cut", ("garbage", "another", "empty")[number % 3])
    if (name, how) != ("runs/*/inputs.json", "another")
]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_a_damaged_artifact_names_what_to_run_again(finished: Path, tmp_path: Path, name: str, how: str) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    (path,) = work.glob(name)
    damage(path, how)
    reader, again = ARTIFACTS[name]
    with pytest.raises(UserError) as error:
        reader(work)
    assert again in str(error.value)
    assert len(str(error.value)) < 1000
