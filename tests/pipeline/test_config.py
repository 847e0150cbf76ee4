"""Settings: files, flags, defaults, and the mistakes people make in them."""

import errno
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.errors import UserError
from pipeline.schema import Settings
from pipeline.settings import fields, flatten, load_settings, mistakes, plain_type, replaced, select


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
    with pytest.raises(UserError, match=r"^seed is 5000000000 and must be below 4294967296$"):
        load_settings({"seed": 5_000_000_000})
    assert load_settings({"seed": 2**32 - 1}).seed == 2**32 - 1


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


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2\n", "training: {batch_size: 3}\nseed: 1\ntraining: {batch_size: 4}\n"]
)
def test_what_stands_twice_in_a_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"(seed|training) stands twice \(again in line [23]\)"):
        parse("--config", str(path))


def test_home_and_variables_in_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("DATA", "/data")
    settings = load_settings({"work": "~/work", "dataset": {"root": "$DATA/coco"}})
    assert (settings.work, settings.dataset.root) == ("/home/x/work", "/data/coco")


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
        ["--training.batches", "neighborhoods", "--neighbors.draw", "anywhere"],
        ["--training.batches", "neighborhoods", "--loss.base", "struc"],
        ["--training.batches", "neighborhoods", "--loss.base", "struc", "--loss.structure", "ground_truth"],
        ["--training.batches", "neighborhoods", "--loss.base", "fine_grained"],
        ["--training.batches", "neighborhoods", "--training.batch_size", "3"],
        ["--training.compile", "true", "--model.pvse.embeddings", "2"],
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        parse(*words)


def test_select_takes_settings_by_name() -> None:
    assert select(Settings(), ("seed", "neighbors.k")) == {"seed": 0, "neighbors.k": 200}


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help-all")
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


def test_a_disk_that_is_full_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit, match="2"):
        run_script(write)
    assert capsys.readouterr().err.endswith(": No space left on device; make room, and run the same command again\n")


NUMBERS = [name for name, field, _ in fields() if plain_type(field) in (int, float, list[int]) or "list" in str(field)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 10**40, float("nan"), float("inf")])
def test_every_number_has_a_range(name: str, value: float) -> None:
    default = flatten(Settings())[name]
    if isinstance(default, float) or name in ("loss.tan_squared_alpha", "loss.margin"):
        value = -1 if value == 10**40 else value
    wrong = [value, 1] if isinstance(default, list) else value
    with pytest.raises(UserError, match=f"^{name} is .* and must be "):
        replaced(Settings(), {name: wrong})


def test_null_is_only_for_settings_that_say_so() -> None:
    with pytest.raises(UserError) as error:
        load_settings({"seed": None, "training": {"batch_size": None}, "loss": {"margin": None}})
    assert str(error.value).split("; ") == [
        "seed is null and must be a whole number",
        "training.batch_size is null and must be a whole number",
    ]


def test_wrong_types_ranges_and_combinations_are_listed_together(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "training: {batch_size: many, learning_rate: .nan}\nloss: {margin: -1}\n"
        "dataset: {source: manifest, name: a/b, karpathy_split: true}\nseed: null\n"
    )
    with pytest.raises(UserError) as error:
        parse("--config", str(path), "--loss.base", "cosine", "--neighbors.k", "0", "--doc2vec.epochs", "1.5")
    assert {message.split(" ")[0] for message in str(error.value).split("; ")} == {
        "training.batch_size",
        "training.learning_rate",
        "loss.margin",
        "loss.base",
        "dataset.source",
        "dataset.name",
        "dataset.karpathy_split",
        "neighbors.k",
        "doc2vec.epochs",
        "seed",
    }


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--loss.margin", "0.3"], "loss.margin"),
        (["--loss.base", "triplet", "--loss.form", "hinge"], "loss.form"),
        (["--loss.base", "struc", "--loss.tan_squared_alpha", "0.3"], "loss.tan_squared_alpha"),
        (["--loss.label_strength", "3"], "loss.label_strength"),
        (
            ["--loss.base", "fine_grained", "--loss.labels", "equal", "--loss.label_strength", "3"],
            "loss.label_strength",
        ),
        (["--neighbors.method", "exact", "--neighbors.hnsw_m", "8"], "neighbors.hnsw_m"),
        (["--model.image.trainable", "false", "--training.pixel_cache", "raw"], "training.pixel_cache"),
        (["--training.pixel_cache", "raw", "--training.pixel_cache_gb", "2"], "training.pixel_cache_gb"),
        (["--model.pvse.embeddings", "1", "--model.pvse.mmd_weight", "1"], "model.pvse.mmd_weight"),
        (["--dataset.synthetic.pairs", "20"], "dataset.synthetic.pairs"),
        (["--training.compile", "true", "--model.image.trainable", "false"], "training.compile"),
        (["--dataset.near_duplicates=false", "--dataset.near_duplicate_threshold=0.5"], "near_duplicate_threshold"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(words: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["a.py", "--config", str(ROOT / "configs" / "paper.yaml"), *words])
    with pytest.raises(UserError, match=f"{name} is .*, which nothing reads: it goes with"):
        parse_settings(make_parser("A script."))
    # A script that calls others passes on all flags; a file may hold settings for a choice that flags make.
    assert parse(*words)


@pytest.mark.parametrize(
    "text",
    [
        "training: 3",
        "training: [1]",
        "training:",
        "seed: 2020-99-99",
        "seed: &a [*a]",
        "seed: &a [[1], [1]]\nwork: [*a, *a]",
        "[" * 5000,
        "!!python/object/apply:os.system ['touch ran']",
        "seed: " + "9" * 5000,
        "x: !!timestamp 5",
        "null",
        'work: "\\ud800"',
        'work: "a\\0"',
    ],
)
def test_a_hostile_file_ends_in_one_line_and_runs_nothing(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", str(path))
    assert len(str(error.value)) < 1000 and not (tmp_path / "ran").exists()


def test_a_list_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """Nine levels of ten aliases each are 10^9 numbers, once they are written out."""
    path = tmp_path / "config.yaml"
    nested = "[1]"
    for number in range(9):
        nested = f"[&b{number} {nested}{f', *b{number}' * 9}]"
    path.write_text(f"evaluation: {{kway: {nested}}}")
    with pytest.raises(UserError, match=r"evaluation\.kway must be a single value or a list of such"):
        parse("--config", str(path))
