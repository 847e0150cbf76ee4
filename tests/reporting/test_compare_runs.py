"""compare_runs.py on run folders made up here."""

import json
from pathlib import Path

import numpy as np
import pytest

import compare_runs
from metrics import Scores
from pipeline.errors import UserError
from pipeline.files import fingerprint
from reporting.figures import write_scores


def evaluated(run: Path, scores: list[float], dataset: str = "one") -> Path:
    """A run's folder with one figure of the pairs 0, 1, 2 ..."""
    run.mkdir()
    (run / "best.pt").write_text(f"the weights of {run.name}")
    (run / "inputs.json").write_text(json.dumps({"pairs.parquet": dataset}))
    (run / "evaluate.json").write_text(json.dumps({"checkpoint": fingerprint(run / "best.pt")}))
    figure = {"value": float(np.mean(scores)), "chance": 0.5}
    (run / "metrics.json").write_text(json.dumps({"figures": {"score": figure}}))
    pairs = np.arange(len(scores))
    write_scores(run, pairs, pairs, {"score": Scores(np.array(scores))})
    return run


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = evaluated(tmp_path / "one", [0, 1, 0, 1]), evaluated(tmp_path / "other", [1, 1, 0, 1])
    compare_runs.main([str(one), str(other)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("score")]
    assert line.split()[1:4] == ["0.5000", "0.7500", "+0.2500"]


def test_runs_on_different_datasets_are_not_compared(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / name, [0, 1], dataset=name) for name in ("one", "other")]
    with pytest.raises(UserError, match=r"different pairs\.parquet"):
        compare_runs.main([str(run) for run in runs])


@pytest.mark.parametrize("gone", [False, True])
def test_figures_of_an_earlier_training_are_not_compared(tmp_path: Path, gone: bool) -> None:
    one, other = evaluated(tmp_path / "one", [0, 1]), evaluated(tmp_path / "other", [1, 1])
    (other / "evaluate.json").unlink() if gone else (other / "best.pt").write_text("trained anew")
    with pytest.raises(UserError, match=r"is not of the best\.pt there; run evaluate\.py"):
        compare_runs.main([str(one), str(other)])
