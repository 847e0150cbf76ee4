"""The search for the loss weights, through the command line, on a tiny prepared dataset."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import optuna
import pytest
from conftest import TINY, one_line_error, run_script
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.command_line import make_parser, parse_settings
from pipeline.files import lock
from pipeline.pairs import read_pairs
from training import tuning
from training.runs import Weights

pytestmark = pytest.mark.slow

SCRIPT = "tune_loss_weights.py"


def tune(work: Path, *words: str, trials: int = 3) -> str:
    return run_script(SCRIPT, *TINY, "--work", work, "--tuning.trials", str(trials), *words).stdout


def study_of(work: Path, search: str) -> optuna.Study:
    (path,) = work.glob(f"tuning/*/{search}/trials.db")
    return optuna.load_study(study_name="weights", storage=f"sqlite:///{path}")


def asked(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


@pytest.fixture(scope="module")
def tuned(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORK with three trials of each search; not to be changed."""
    work = tmp_path_factory.mktemp("tuned") / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    tune(work)
    return work


def test_both_searches_get_the_same_number_of_trials_and_begin_with_the_papers_weights(tuned: Path) -> None:
    baseline, method = study_of(tuned, "baseline"), study_of(tuned, "method")
    assert len(asked(baseline)) == len(asked(method)) == 3
    assert asked(baseline)[0] == {"sym": 1}
    assert asked(method)[0] == {"sym": 1, "img": 0.3, "text": 0.2}
    for params in (*asked(baseline), *asked(method)):
        assert all(tuning.LOWEST <= value <= tuning.HIGHEST for value in params.values())


def test_the_best_is_what_training_with_it_scores_on_the_validation_split(tuned: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(tuned, work)
    shown = tune(work)
    assert shown.count("up to date") == 2
    command = re.search(r"method: .*\nnext: python (\S+) (.*)", shown)
    run_script(command[1], *command[2].split())
    (run,) = (work / "runs").iterdir()
    (best,) = work.glob("tuning/*/method/best.json")
    found = json.loads(best.read_text())
    assert json.loads((run / "run.json").read_text())["val_recall_at_1"] == found["value"]
    assert found["value"] == max(trial.value for trial in study_of(work, "method").trials if trial.value)


def test_a_search_that_was_stopped_asks_for_what_it_would_have_asked_for(tuned: Path, prepared: Path) -> None:
    tune(prepared, trials=1)
    study = study_of(prepared, "method")
    study.ask()  # a trial that was killed: Optuna has it as running
    tune(prepared)
    for search in ("baseline", "method"):
        assert asked(study_of(prepared, search)) == asked(study_of(tuned, search))


def test_each_trial_leaves_curves_and_hparams(tuned: Path) -> None:
    folders = sorted(tuned.glob("tuning/*/method/trial_*"))
    assert len(folders) == 3
    for folder in folders:
        events = EventAccumulator(str(folder))
        events.Reload()
        assert {"data/val_loss", "data/l_img", "hparam/val_recall_at_1"} <= set(events.Tags()["scalars"])
        assert "_hparams_/session_start_info" in events.summary_metadata


def test_trials_of_other_settings_do_not_mix(tuned: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(tuned, work)
    tune(work, "--training.learning_rate", "0.01", trials=1)
    assert len(list(work.glob("tuning/*"))) == 2


def test_trials_of_other_encoder_weights_do_not_mix(tuned: Path, tmp_path: Path) -> None:
    settings = parse_settings(make_parser(""), [*TINY, "--work", str(tuned)])[0]
    settings.model.image.weights = str(tmp_path / "weights.pth")
    folders = set()
    for content in (b"some", b"others"):
        (tmp_path / "weights.pth").write_bytes(content)
        folders.add(tuning.search_folder(settings))
    assert len(folders) == 2


def test_a_second_search_of_the_same_settings_is_refused(tuned: Path) -> None:
    (folder,) = tuned.glob("tuning/*")
    with lock(folder):
        told = one_line_error(run_script(SCRIPT, *TINY, "--work", tuned, "--tuning.trials", "3", ok=False))
    assert f"is at work in {folder}" in told


def test_neighbors_of_vectors_that_have_changed_are_not_searched_with(prepared: Path, tmp_path: Path) -> None:
    words = [*TINY, "--work", prepared, "--neighbors.space", f"file:{tmp_path / 'vectors.npy'}"]
    vectors = np.random.default_rng(0).normal(size=(len(read_pairs(prepared, ["text"])), 4)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    run_script("knn_document_features.py", *words)
    np.save(tmp_path / "vectors.npy", -vectors)
    told = one_line_error(run_script(SCRIPT, *words, "--tuning.trials", "1", ok=False))
    assert "run knn_document_features.py with these settings (again)" in told


def test_weights_are_those_one_would_type() -> None:
    trial = optuna.trial.FixedTrial({"sym": 0.123456})
    assert tuning.suggest(trial, ("sym",)) == Weights(0.12, 0, 0)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "prepare_dataset.py" in one_line_error(run_script(SCRIPT, *TINY, "--work", tmp_path, ok=False))
    wrong = run_script(SCRIPT, *TINY, "--tuning.trials", "0", ok=False)
    assert "tuning.trials" in one_line_error(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.base", "struc", "--loss.structure", "ground_truth"], "needs the weight IMG 0"),
        (["--loss.base", "fine_grained"], "no symmetric term"),
    ],
)
def test_weights_that_training_refuses_are_not_searched(words: list[str], message: str) -> None:
    assert message in one_line_error(run_script(SCRIPT, *TINY, *words, ok=False))
    assert message in one_line_error(
        run_script("train_cross_modal_retrieval_model.py", "1", "1", "1", *TINY, *words, ok=False)
    )


def test_an_optimum_at_a_bound_is_told() -> None:
    every = tuning.SEARCHES["method"]
    assert tuning.at_bounds(Weights(1, 0.3, 0.2), every) == []
    assert tuning.at_bounds(Weights(10, 0.03, 0.2), every) == [
        "SYM 10 is at the upper bound of the search, 10",
        "IMG 0.03 is at the lower bound of the search, 0.03",
    ]
    assert tuning.at_bounds(Weights(9.7, 0, 0), ("sym",)) == ["SYM 9.7 is at the upper bound of the search, 10"]
