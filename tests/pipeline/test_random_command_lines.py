"""Random command lines of every script: each ends with exit code 0 or 2, and a mistake in one line."""

import importlib
import random
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from pipeline.command_line import run_script
from pipeline.settings import Settings, flatten

WITH_SETTINGS = (
    "prepare_dataset",
    "train_doc2vec",
    "extract_doc2vec_vectors",
    "extract_image_features",
    "knn_document_features",
    "train_siamese_labels",
    "train_cross_modal_retrieval_model",
    "tune_loss_weights",
    "reproduce_tables",
)
OF_RUNS = ("evaluate", "search", "encode", "compare_runs", "make_report", "export_run")
LINES_A_SCRIPT = 20

VALUES = [
    *("", " ", "0", "-1", "1", "1e999", "nan", "2147483648", "99999999999999999999", "0.5", "true", "null", "none"),
    *("[", "[1,2", "{a: 1}", "a=b", "--", "-", "é\u202e\x1b[31m", "two\nlines", "%s%n{0}", "~nobody/x", "$NOT_SET/x"),
    *("/etc", "/etc/passwd", "/dev/null", "/no/such", ".", "..", "no.csv", "x" * 5000, "../" * 40),
]
FLAGS = [
    *("--run", "--runs", "--out", "--texts", "--images", "--image", "--top", "--split", "--count", "--queries"),
    *("--config", "--seeds", "--tables", "--methods", "--trials", "--resume", "--overwrite", "--refresh", "--force"),
    *("--json", "--device", "--port", "--name", "--help", "--help-all", "--no-such", "--work", "--features", "--seed"),
]


def command_line(script: str, rng: random.Random, empty: Path) -> list[str]:
    """Words that a script may or may not take. None of them leads it to real work: WORK and the dataset are empty."""
    settings = [f"--{name}" for name in flatten(Settings())]
    words = []
    for _ in range(rng.randint(0, 6)):
        kind = rng.random()
        if kind < 0.6:
            words.append(rng.choice(settings if script in WITH_SETTINGS and rng.random() < 0.6 else FLAGS))
        if kind > 0.1:
            words.append(rng.choice(VALUES))
    if script in WITH_SETTINGS:
        here = ["--work", str(empty / "work"), "--dataset.source", "manifest", "--dataset.manifest", "no.csv"]
        words = [*TINY, *words, *here]
        if script.startswith("train_cross") and rng.random() < 0.8:
            words = ["1", "0.3", "0.2", *words]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("script", [*WITH_SETTINGS, *OF_RUNS])
def test_a_random_command_line_ends_in_a_line(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, rng = importlib.import_module(script), random.Random(script)
    monkeypatch.chdir(tmp_path)
    for number in range(LINES_A_SCRIPT):
        words = command_line(script, rng, tmp_path / str(number))
        monkeypatch.setattr("sys.argv", [str(ROOT / f"{script}.py"), *words])
        code: object = 0
        try:
            run_script(module.main)
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err
        assert code in (None, 0, 2), (words, error)
        assert "Traceback" not in error, (words, error)
        if code == 2:
            assert len(error.strip("\n").splitlines()) == 1, (words, error)
