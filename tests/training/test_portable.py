"""Runs that travel: a run copied alone, a WORK copied without times, and a run in one file."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, WITHOUT_STEPS_1_TO_3, one_line_error, run_script
from PIL import Image

import encode
import evaluate
import export_run
import search
import train_cross_modal_retrieval_model as training
from pipeline.errors import UserError
from training.encoder import RunEncoder

TEXTS = ["red circle", "blue square on the left", "zzqx"]


@pytest.fixture(scope="module")
def run(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run in a WORK of its own; not to be changed."""
    work = tmp_path_factory.mktemp("travels") / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    return training.main(["1", "0.3", "0.2", *TINY, "--work", str(work), "--training.max_epochs", "1"])


@pytest.fixture
def texts(run: Path, tmp_path: Path) -> Path:
    """A file of TEXTS and of words that the run knows."""
    words = (run.parents[1] / "doc2vec" / "vocabulary.txt").read_text(encoding="utf-8").splitlines()[3:9]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*TEXTS, *words]), encoding="utf-8")
    return path


def copied(folder: Path, to: Path) -> Path:
    """As `cp -r` copies: with new times."""
    shutil.copytree(folder, to, copy_function=shutil.copyfile)
    return to


def encoded(run: Path, texts: Path, out: Path) -> np.ndarray:
    encode.main(["--run", str(run), "--texts", str(texts), "--out", str(out)])
    return np.load(out)


def test_a_run_copied_alone_encodes_from_any_folder(
    run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = encoded(run, texts, tmp_path / "there.npy")
    assert np.isfinite(there[-1]).all() and np.isnan(there[2]).all()
    copy = copied(run, tmp_path / "elsewhere")
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    np.testing.assert_array_equal(encoded(copy, texts, Path("here.npy")), there)
    with pytest.raises(UserError, match=r"pairs\.parquet is not there.*can encode \(encode\.py\) and not search"):
        search.main(["--run", str(copy), "anything"])


def test_a_work_copied_without_times_is_searched_and_evaluated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copied(run.parents[1], tmp_path / "copy") / "runs" / run.name
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    evaluate.main(["--run", str(copy)])
    word = (copy / "encoder" / "vocabulary.txt").read_text(encoding="utf-8").splitlines()[3]
    capsys.readouterr()
    search.main(["--run", str(copy), word, "--top", "3", "--json"])
    assert len(json.loads(capsys.readouterr().out)["images"]) == 3


def test_an_exported_run_encodes_as_the_run_without_the_libraries_of_steps_1_to_3(
    run: Path, texts: Path, tmp_path: Path
) -> None:
    there = encoded(run, texts, tmp_path / "there.npy")
    for name in ("one.zip", "other.zip"):
        export_run.main(["--run", str(run), "--out", str(tmp_path / name)])
    exported = tmp_path / "one.zip"
    assert exported.read_bytes() == (tmp_path / "other.zip").read_bytes()
    with zipfile.ZipFile(exported) as archive:
        assert not any(name.endswith((".pt", ".pkl")) for name in archive.namelist())
        card = archive.read("README.md").decode()
    assert "SYM 1, IMG 0.3, TEXT 0.2" in card and "## Measured" in card
    command = [
        str(ROOT),
        str(ROOT / "encode.py"),
        "--run",
        str(exported),
        "--texts",
        str(texts),
        "--out",
        "vectors.npy",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_STEPS_1_TO_3, *map(str, command)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), there, atol=1e-6)


def test_an_exported_run_has_the_images_encoder_too(run: Path, tmp_path: Path) -> None:
    export_run.main(["--run", str(run), "--out", str(tmp_path / "run.zip")])
    encoder = RunEncoder(run)
    images = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(images):
        Image.effect_noise((64, 64), 50 + number).save(path)
    vectors, problems = encoder.images(images)
    assert not problems
    np.testing.assert_allclose(RunEncoder(tmp_path / "run.zip").images(images)[0], vectors, atol=1e-6)


def test_a_flipped_bit_of_an_export_is_told(run: Path, tmp_path: Path) -> None:
    """Or it changes nothing: a time, the model card, how the archive was packed."""
    export_run.main(["--run", str(run), "--out", str(tmp_path / "run.zip")])
    content, chance = (tmp_path / "run.zip").read_bytes(), random.Random(0)
    wanted, told = RunEncoder(tmp_path / "run.zip").texts(TEXTS)[0], 0
    # Half of the flips are near the end, where the archive has its directory.
    for place in [chance.randrange(len(content)) for _ in range(40)] + [-chance.randrange(1, 700) for _ in range(40)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "run.zip").write_bytes(damaged)
        try:
            found = RunEncoder(tmp_path / "run.zip").texts(TEXTS)[0]
        except UserError:
            told += 1
        else:
            np.testing.assert_array_equal(found, wanted)
    assert told > 30


def test_what_is_no_export_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_text("no zip file")
    with pytest.raises(UserError, match=r"no\.zip is no run: neither its folder nor a file of export_run\.py"):
        RunEncoder(tmp_path / "no.zip")
    export_run.main(["--run", str(run), "--out", str(tmp_path / "run.zip")])
    with pytest.raises(UserError, match="is an exported run: it can encode"):
        search.main(["--run", str(tmp_path / "run.zip"), "red"])
    assert "is a file, perhaps an exported run" in one_line_error(
        run_script("export_run.py", "--run", tmp_path / "run.zip", "--out", tmp_path / "x.zip", ok=False)
    )


def test_a_changed_encoder_file_is_told(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "copy")
    with (copy / "encoder" / "vocabulary.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match=r"vocabulary\.txt is missing or has changed; copy the run again"):
        RunEncoder(copy)
