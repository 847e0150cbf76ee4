"""What every script does with --help, a wrong setting, and a work folder that is not there."""

from pathlib import Path

import pytest
from conftest import TINY, one_line_error, run_script

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, list[str]] = {
    "prepare_dataset.py": [],
    "train_doc2vec.py": [],
    "extract_doc2vec_vectors.py": [],
    "knn_document_features.py": [],
    "extract_image_features.py": [],
    "train_siamese_labels.py": [],
    "train_cross_modal_retrieval_model.py": ["1", "0.3", "0.2"],
    "tune_loss_weights.py": [],
    "reproduce_tables.py": ["--seeds", "1"],
}


@pytest.mark.parametrize("script", ARGUMENTS)
def test_help_explains_the_script_and_its_settings(script: str) -> None:
    shown = run_script(script, "--help").stdout
    assert script in shown and "--work" in shown and "--help-all" in shown
    assert "--training.batch_size" in run_script(script, "--help-all").stdout


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_wrong_setting_names_the_nearest(script: str, tmp_path: Path) -> None:
    words = [*ARGUMENTS[script], *TINY, "--work", tmp_path]
    assert "did you mean doc2vec.epochs?" in one_line_error(
        run_script(script, *words, "--doc2vec.epoch", "3", ok=False)
    )
    config = tmp_path / "config.yaml"
    config.write_text("doc2vec: {epoch: 3}\n")
    wrong = run_script(script, *ARGUMENTS[script], "--config", config, "--work", tmp_path, ok=False)
    assert "did you mean doc2vec.epochs?" in one_line_error(wrong)


@pytest.mark.parametrize(
    "script", [name for name in ARGUMENTS if name not in ("prepare_dataset.py", "reproduce_tables.py")]
)
def test_without_prepared_pairs_the_step_to_run_is_named(script: str, tmp_path: Path) -> None:
    words = [*ARGUMENTS[script], *TINY, "--work", tmp_path / "nothing"]
    assert "prepare_dataset.py" in one_line_error(run_script(script, *words, ok=False))


@pytest.mark.parametrize("script", ["prepare_dataset.py", "reproduce_tables.py"])
def test_an_empty_dataset_ends_in_one_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("image,text\n")
    words = ["--dataset.source", "manifest", "--dataset.manifest", tmp_path / "empty.csv", "--work", tmp_path / "work"]
    message = one_line_error(run_script(script, *ARGUMENTS[script], *TINY, *words, ok=False))
    assert "hold no rows" in message
