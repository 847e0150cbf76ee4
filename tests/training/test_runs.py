"""A run's folder: what its config.yaml must hold, and which changes of its inputs are seen."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from pipeline.devices import choose_device, use_precision
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.pairs import SCHEMA, write_pairs
from pipeline.schema import Settings
from pipeline.work import Work
from training.runs import Weights, describe_run, read_run, readable_name, start_run, what_changed_since, work_of

WEIGHTS = Weights(1, 0, 0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a WORK with one image and files that are there and no more."""
    settings = Settings(work=str(tmp_path / "work"))
    (tmp_path / "drawing.png").write_bytes(b"image")
    (tmp_path / "backbone.pt").write_bytes(b"weights")
    settings.model.image.weights = str(tmp_path / "backbone.pt")
    row = {"image_id": "a", "image_path": "drawing.png", "text": "a", "category": None, "split": "train"}
    batch = pa.RecordBatch.from_pylist([row], SCHEMA)
    (tmp_path / "work" / "doc2vec").mkdir(parents=True)
    write_pairs(tmp_path / "work" / "pairs.parquet", [batch], tmp_path)
    for name in ("word_vectors", "vectors", "tokens", "offsets"):
        np.save(tmp_path / "work" / "doc2vec" / f"{name}.npy", np.zeros(3))
    return settings


@pytest.fixture
def run(settings: Settings) -> Path:
    run = settings.work_folder / "runs" / "run"
    assert start_run(run, settings, WEIGHTS, resume=False)
    return run


def test_a_run_is_read_as_it_was_started(settings: Settings, run: Path) -> None:
    assert read_run(run) == (settings, WEIGHTS)
    assert what_changed_since(run, settings) is None


def test_a_run_has_a_name_for_people(settings: Settings) -> None:
    run = Work(settings.work_folder).runs / "l_i2t_l_sym_1_l_img_0_l_text_0-loss.form=hinge-seed=4"
    start_run(run, settings, WEIGHTS, resume=False)
    assert readable_name(run) == "SYM 1, IMG 0, TEXT 0, loss.form hinge, seed 4"
    assert describe_run(run) == {
        "dataset": "openclipart",
        "method": "angular N-pairs loss without neighbors",
        "weights": "text to image 1, images of neighbors 0, neighboring texts 0",
        "others": ["loss.form hinge"],
        "seed": 0,
        "folder": run.name,
    }
    small = run.rename(run.with_name("l_i2t_l_sym_1_l_img_0_l_text_0-training.learning_rate=1e-05-seed=4"))
    assert readable_name(small) == "SYM 1, IMG 0, TEXT 0, training.learning_rate 1e-05, seed 4"
    monday = small.rename(small.with_name("monday"))
    assert readable_name(monday) == "monday" and describe_run(monday)["others"] == []


def test_settings_newer_than_the_run_take_their_defaults(settings: Settings, run: Path) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["tuning"], tree["model"]["pvse"], tree["training"]["log_every"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert read_run(run) == (settings, WEIGHTS)
    assert what_changed_since(run, settings) is None


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_a_config_that_was_cut_off_is_told(run: Path, share: float) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: int(share * len(text))])
    with pytest.raises(UserError, match=r"config\.yaml is broken or cut off; train"):
        read_run(run)


def test_a_config_that_was_edited_or_damaged_is_told(run: Path) -> None:
    path = run / "config.yaml"
    content, wanted = path.read_bytes(), read_run(run)
    path.write_text(content.decode().replace("batch_size: 64", "batch_size: 65"))
    with pytest.raises(UserError, match=r"config\.yaml: it is damaged, or was edited .*; train .* --overwrite"):
        read_run(run)
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_run(run)
        except UserError as error:
            assert "--overwrite" in str(error)
        else:
            assert found == wanted


@pytest.mark.parametrize("text", ["a: [b", "[1, 2]", "weights: 3\nevaluation: {batch_size: 3}\n", "weights: {a: 3}"])
def test_a_config_that_is_none_is_told(run: Path, text: str) -> None:
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml is broken"):
        read_run(run)


def test_changed_images_and_weights_are_seen(settings: Settings, run: Path, tmp_path: Path) -> None:
    (tmp_path / "backbone.pt").write_bytes(b"others")
    assert what_changed_since(run, settings) == "on another file model.image.weights"
    (tmp_path / "backbone.pt").write_bytes(b"weights")
    image = tmp_path / "drawing.png"
    before = image.stat()
    image.write_bytes(b"another image")
    assert what_changed_since(run, settings) == "on another set of image files"
    image.write_bytes(b"image")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert what_changed_since(run, settings) is None


def test_runs_that_do_not_name_their_images_stay_valid(settings: Settings, run: Path, tmp_path: Path) -> None:
    inputs = read_json(run / "inputs.json")
    old = {name: value for name, value in inputs.items() if (settings.work_folder / name).exists()}
    assert len(old) == len(inputs) - 2
    (run / "inputs.json").write_text(json.dumps(old))
    (tmp_path / "drawing.png").unlink()
    assert what_changed_since(run, settings) is None
    np.save(settings.work_folder / "doc2vec" / "vectors.npy", np.ones(3))
    assert what_changed_since(run, settings) == "on another doc2vec/vectors.npy"


def test_a_missing_input_is_told(settings: Settings, run: Path) -> None:
    (settings.work_folder / "doc2vec" / "tokens.npy").unlink()
    with pytest.raises(UserError, match=r"tokens\.npy is not there; run steps 0 to 3"):
        what_changed_since(run, settings)


def test_products_on_a_gpu_are_rounded_to_tf32_only_where_asked_for() -> None:
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    assert choose_device("cpu") == torch.device("cpu")
    for precision in ("float32", "tf32", "bf16", "tf32", "float32"):
        use_precision(precision)
        assert all(flag.allow_tf32 is (precision == "tf32") for flag in flags)


def test_a_run_below_a_folder_whose_name_is_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named from there it is used; its absolute path cannot be a setting, and one line says so."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    run = folder / "work" / "runs" / "name"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("weights: {}\n")
    with pytest.raises(UserError, match="is not UTF-8, as settings are; go into its folder and name it from there"):
        read_run(run)
    monkeypatch.chdir(folder)
    assert work_of(Path("work/runs/name")) == Path("work")
    monkeypatch.chdir(run)
    assert work_of(Path(".")).resolve() == folder / "work"
