"""Settings: files, flags, defaults, and the mistakes people make in them."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT

from config import (
    Settings,
    UserError,
    flatten,
    load_settings,
    make_parser,
    mistakes,
    parse_settings,
    run_script,
    select,
)


def parse(*words: str) -> Settings:
    return parse_settings(make_parser("A script."), list(words))[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\ntraining:\n  batch_size: 8\n  learning_rate: 1e-3\nneighbors:\n  draw_from: null\n")
    return path


def test_flags_win_over_the_file_and_the_file_over_the_defaults(config: Path) -> None:
    settings, of_file, _ = parse_settings(
        make_parser("A script."), ["--config", str(config), "--training.batch_size", "16"]
    )
    assert (settings.seed, settings.training.batch_size, settings.training.learning_rate) == (3, 16, 1e-3)
    assert settings.training.weight_decay == Settings().training.weight_decay
    assert of_file.training.batch_size == 8


def test_without_a_config_the_scripts_take_openclipart() -> None:
    assert parse() == load_settings(ROOT / "configs" / "openclipart.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert not mistakes(load_settings(path))


def test_a_seed_that_gensim_does_not_take_is_a_mistake() -> None:
    assert mistakes(Settings(seed=5_000_000_000)) == [
        "seed is 5000000000 and must be below 2^32, as gensim takes no more"
    ]
    assert not mistakes(Settings(seed=2**32 - 1))


def test_paper_config_says_what_the_defaults_are() -> None:
    assert load_settings(ROOT / "configs" / "paper.yaml") == Settings()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.batchsize", "3"], "did you mean training.batch_size?"),
        (["--training.batch_size", "many"], "training.batch_size"),
        (["--loss.base", "cosine"], "loss.base"),
        (["--config", "/nowhere.yaml"], "cannot read the config /nowhere.yaml"),
        (["stray"], "stray is one argument too many"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        parse(*words)
    except SystemExit as end:
        assert end.code == 2
        error = capsys.readouterr().err
    except UserError as end:
        error = f"{end}\n"
    assert message in error
    assert error.count("\n") == 1


def test_wrong_keys_in_a_file_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("trainning: {batch_size: 3}\nneighbors: {kk: 3}\n")
    with pytest.raises(UserError, match=r"trainning.*neighbors.kk; did you mean neighbors.k\?"):
        parse("--config", str(path))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "training: 3"])
def test_a_file_that_is_no_settings_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises((UserError, SystemExit)):
        parse("--config", str(path))


def test_all_wrong_values_are_listed_at_once() -> None:
    with pytest.raises(UserError) as error:
        parse("--training.batch_size", "0", "--loss.margin", "-1", "--neighbors.min_recall", "2")
    for name in ("training.batch_size", "loss.margin", "neighbors.min_recall"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--doc2vec.hierarchical_softmax", "false", "--doc2vec.negative", "0"],
        ["--loss.tile_negatives", "true", "--loss.form", "hinge"],
        ["--dataset.source", "manifest"],
        ["--dataset.val_share", "0.6", "--dataset.test_share", "0.5"],
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        parse(*words)


def test_select_takes_whole_sections_and_single_settings() -> None:
    chosen = select(Settings(), ("seed", "text", "neighbors.k"))
    assert set(chosen) == {"seed", "neighbors.k", *(name for name in flatten(Settings()) if name.startswith("text."))}


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in flatten(Settings()):
        assert f"--{name} " in shown


def test_a_script_names_the_next_one_with_the_settings_of_its_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", "--work", "my work", "--seed", "1"])
    run_script(lambda: None, then="train.py 1 0.3 0.2")
    assert capsys.readouterr().out == "next: python train.py 1 0.3 0.2 --work 'my work' --seed 1\n"

    def wrong() -> None:
        raise UserError("not so")

    with pytest.raises(SystemExit):
        run_script(wrong, then="train.py")
    assert "next" not in capsys.readouterr().out
