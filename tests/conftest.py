"""Small prepared datasets for the tests, made once by the real scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # the tests are small: threads would only wait for each other

# A made-up dataset so small that every step takes a second or two.
TINY = ["--config", str(ROOT / "tests" / "tiny.yaml")]


def run_script(
    script: str, *words: str | Path, ok: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does; with `ok`, fail the test where it does not exit with 0."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a script that ended in a user's mistake: one line on stderr, exit code 2, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def prepare(work: Path, *words: str) -> None:
    """Steps 0 to 3 on the tiny dataset, and its images' features, so that not every test computes them."""
    for script in (
        "prepare_dataset.py",
        "train_doc2vec.py",
        "extract_doc2vec_vectors.py",
        "knn_document_features.py",
        "extract_image_features.py",
    ):
        run_script(script, *TINY, "--work", work, *words)


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORK after steps 0 to 3; not to be changed."""
    work = tmp_path_factory.mktemp("prepared") / "work"
    prepare(work)
    return work


@pytest.fixture
def prepared(prepared_once: Path, tmp_path: Path) -> Path:
    """A copy of WORK after steps 0 to 3, to do anything with; its images stay where they are."""
    work = tmp_path / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    return work
