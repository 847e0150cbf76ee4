"""Names, texts and paths that command a terminal, through every script: nothing of them is obeyed."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run_script

from pipeline.schema import Synthetic
from readers.synthetic import World

pytestmark = pytest.mark.slow

ODD = "\x1b]0;title\x07\x1b[2J\x9b1A\r\u202eodd"
COMMANDS = set("\x1b\x07\x9b\r\u202e")


def shown(done: subprocess.CompletedProcess[str], *, ok: bool = True) -> str:
    """What a script printed. Nothing of it commands a terminal."""
    printed = done.stdout + done.stderr
    assert not COMMANDS & set(printed), repr(printed)
    assert "Traceback" not in printed and (done.returncode == 0) == ok, printed
    return printed


def test_every_script_escapes_names_texts_and_paths(tmp_path: Path) -> None:
    """Every script at the top is run, most of them to their end; a mistake is told with the name in it too."""
    folder = tmp_path / ODD
    (folder / "images").mkdir(parents=True)
    world, rows = World(Synthetic(topics=4, literalness=1.0), random.Random(0)), []
    for number in range(90):
        picture, (text,) = world.captioned(1)
        name = f"images/{ODD}\n{number:02}.png"
        picture.save(folder / name)
        split = ("train", "val", "test")[number % 3]
        rows.append({"image": name, "text": f"{ODD} {text}", "split": split, "category": f"{ODD}{number % 4}"})
    rows.append({"image": f"{ODD}\ngone.png", "text": ODD, "split": "train"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = [*TINY, "--work", str(folder / "work"), "--dataset.source", "manifest", "--dataset.name", ODD]
    flags += ["--dataset.manifest", str(folder / "pairs.jsonl"), "--dataset.near_duplicates", "false"]
    flags += ["--training.max_epochs", "1"]
    said = {}
    for script in (
        *("prepare_dataset.py", "train_doc2vec.py", "extract_doc2vec_vectors.py", "knn_document_features.py"),
        *("extract_image_features.py", "train_siamese_labels.py"),
    ):
        said[script] = shown(run_script(script, *flags, ok=False))
    shutil.rmtree(folder / "work" / "image_features")
    train = ["train_cross_modal_retrieval_model.py", "1", "0.3", "0.2", *flags]
    one = next((folder / "images").iterdir())
    one.rename(folder / "elsewhere")
    shown(run_script(*train, ok=False), ok=False)
    (folder / "elsewhere").rename(one)
    said[train[0]] = shown(run_script(*train, ok=False))
    (run,) = (folder / "work" / "runs").iterdir()
    word = (folder / "work" / "doc2vec" / "vocabulary.txt").read_text().splitlines()[9]
    said["evaluate.py"] = shown(run_script("evaluate.py", "--run", run, ok=False))
    said["compare_runs.py"] = shown(run_script("compare_runs.py", run, ok=False))
    said["search.py"] = shown(run_script("search.py", "--run", run, ODD, word, ok=False))
    found = run_script("search.py", "--run", run, "--json", word, ok=False)
    shown(found)
    assert ODD in json.loads(found.stdout)["images"][0]["text"]
    out = folder / f"{ODD}.npy"
    said["encode.py"] = shown(run_script("encode.py", "--run", run, "--images", folder, "--out", out, ok=False))
    said["export_run.py"] = shown(run_script("export_run.py", "--run", run, "--out", folder / "run.zip", ok=False))
    report = ["--count", "1", "--words", ODD]
    said["make_report.py"] = shown(run_script("make_report.py", "--runs", run, *report, ok=False))
    for script in ("tune_loss_weights.py", "reproduce_tables.py"):
        said[script] = shown(run_script(script, *flags, "--work", folder / "other", f"--{ODD}", ok=False), ok=False)
    scripts = {path.name for path in ROOT.glob("*.py") if "    run_script(main" in path.read_text()}
    assert set(said) == scripts
    without = {script for script, printed in said.items() if "\\u001b]0;title\\u0007" not in printed}
    assert without <= {
        "compare_runs.py",
        "search.py",
    }  # one names runs alone, the other's table has printable characters
