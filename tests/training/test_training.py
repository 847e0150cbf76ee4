"""Steps 4 and 5 through the command line, on a tiny prepared dataset."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, TINY, WITHOUT_STEPS_1_TO_3, one_line_error, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_cross_modal_retrieval_model as training
from datasets import load_prepared, plan_epoch
from models import build_model
from pipeline.command_line import make_parser, parse_settings
from pipeline.errors import UserError
from pipeline.files import LOCK, read_json, write_json
from pipeline.pairs import image_root
from pipeline.schema import Settings
from training import loop
from training.image_sources import image_source
from training.runs import Weights, run_name
from training.trainer import Trainer, build_trainer

pytestmark = pytest.mark.slow

SCRIPT = "train_cross_modal_retrieval_model.py"
METHOD = "l_i2t_l_sym_1_l_img_0_3_l_text_0_2"


def train(work: Path, *words: str, weights: str = "1 0.3 0.2", ok: bool = True, **environment: str) -> Path:
    """Train, and return the run's folder."""
    done = run_script(SCRIPT, *weights.split(), *TINY, "--work", work, *words, ok=ok, **environment)
    (run,) = [Path(line.split()[-1]).parent for line in done.stdout.splitlines() if line.endswith("best.pt")]
    return run


def settings_of(work: Path, *words: str) -> Settings:
    return parse_settings(make_parser(""), [*TINY, "--work", str(work), *words])[0]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def trained(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORK with the method trained and evaluated; not to be changed."""
    work = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    run = train(work)
    run_script("evaluate.py", "--run", run)
    return run


def test_a_run_leaves_what_the_next_step_and_tensorboard_need(trained: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["weights"] == {"sym": 1.0, "img": 0.3, "text": 0.2}
    assert config["training"]["batch_size"] == 32
    curves = scalars(trained)
    for tag in (
        "data/train_loss data/l_i2t data/l_sym data/l_img data/l_text data/val_loss data/learning_rate "
        "speed/pairs_a_second val/5way_recall_at_1_image_to_text test/5way_recall_at_1_text_to_image"
    ).split():
        assert curves[tag], tag
    assert curves["data/val_loss"][0][0] == 0
    assert len(curves["data/val_loss"]) == 3


def test_metrics_are_what_they_say(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    figures = metrics["figures"]
    queries = pq.read_table(trained / "queries.parquet")
    assert len(queries) == metrics["pairs"]
    for name, figure in figures.items():
        if "low" in figure:
            assert figure["low"] <= figure["value"] <= figure["high"]
        if name in queries.column_names:
            assert np.isclose(queries[name].to_numpy().mean(), figure["value"])
    for way in ("image_to_text", "text_to_image"):
        assert 0 < figures[f"map_{way}"]["value"] <= 1
        assert figures[f"recall_at_1_{way}"]["value"] <= figures[f"recall_at_5_{way}"]["value"]
    assert figures["preservation_3_images"]["chance"] == 3 / (metrics["pairs"] - 1)


def test_the_same_command_gives_the_same_files(trained: Path, prepared: Path) -> None:
    run = train(prepared, PYTHONHASHSEED="1")
    run_script("evaluate.py", "--run", run, PYTHONHASHSEED="1")
    assert (run / "metrics.json").read_bytes() == (trained / "metrics.json").read_bytes()
    assert (run / "best.pt").read_bytes() == (trained / "best.pt").read_bytes()
    files = []
    for folder in (run, trained):
        state = torch.load(folder / "last.pt", weights_only=True)
        del state["seconds"], state["curves"]  # TensorBoard's files have the time in their names
        files.append(io.BytesIO())
        torch.save(state, files[-1])
    assert files[0].getvalue() == files[1].getvalue()


def test_nothing_is_done_twice(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir() if path.name != LOCK}
    assert "up to date" in run_script(SCRIPT, "1", "0.3", "0.2", *TINY, "--work", trained.parents[1]).stdout
    shown = run_script("evaluate.py", "--run", trained).stdout
    assert f"up to date {trained / 'metrics.json'}" in shown
    assert "5way_recall_at_1_image_to_text" in shown
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    "words",
    [
        ["--model.image.size", "48"],
        ["--model.text.max_words", "1"],
        ["--work", "elsewhere"],
        ["--seed", "1"],
        ["--training.precision", "bf16"],
    ],
)
def test_evaluate_takes_no_setting_of_the_run(trained: Path, words: list[str]) -> None:
    error = one_line_error(run_script("evaluate.py", "--run", trained, *words, ok=False))
    assert f"{words[0].lstrip('-')} is {words[1]}, and {trained} was trained with" in error


def test_evaluate_sees_changed_images(prepared: Path) -> None:
    run = train(prepared, weights="1 0 0")
    run_script("evaluate.py", "--run", run, "--training.workers", "1")
    assert "up to date" in run_script("evaluate.py", "--run", run).stdout
    assert "wrote" in run_script("evaluate.py", "--run", run, "--evaluation.kway", "[3]").stdout
    stamp = read_json(run / "evaluate.json")
    stamp["images"]["images"] = "of before"
    write_json(run / "evaluate.json", stamp)
    assert "wrote" in run_script("evaluate.py", "--run", run, "--evaluation.kway", "[3]").stdout


def test_force_evaluates_with_other_images_and_never_with_other_words(prepared: Path) -> None:
    run = train(prepared)
    neighbors, words = prepared / "neighbors/doc2vec/distances.npy", prepared / "doc2vec/word_vectors.npy"
    np.save(neighbors, np.load(neighbors) + 1)
    assert "run knn_document_features.py again" in one_line_error(run_script("evaluate.py", "--run", run, ok=False))
    (neighbors.parent / "knn_document_features.json").unlink()  # another table, and not a damaged one
    told = one_line_error(run_script("evaluate.py", "--run", run, ok=False))
    assert "trained on another neighbors/doc2vec/distances.npy" in told and "--force" in told
    assert "wrote" in run_script("evaluate.py", "--run", run, "--force").stdout
    np.save(words, np.load(words) + 1)
    (words.parent / "train_doc2vec.json").unlink()
    for force in ([], ["--force"]):
        told = one_line_error(run_script("evaluate.py", "--run", run, *force, ok=False))
        assert "trained on another doc2vec/word_vectors.npy" in told or not force
        assert force or "--force" not in told


def test_evaluate_names_a_folder_that_is_no_run() -> None:
    assert "no config.yaml" in one_line_error(run_script("evaluate.py", "--run", ".", ok=False))
    assert "names no folder" in one_line_error(run_script("evaluate.py", "--run", "", ok=False))


def test_runs_are_compared_over_the_same_pairs(prepared: Path) -> None:
    baseline, method = train(prepared, weights="1 0 0"), train(prepared)
    assert "has no metrics.json" in one_line_error(run_script("compare_runs.py", baseline, method, ok=False))
    for run in (baseline, method):
        run_script("evaluate.py", "--run", run)
    shown = run_script("compare_runs.py", baseline, method).stdout
    figures = [json.loads((run / "metrics.json").read_text())["figures"] for run in (baseline, method)]
    name = "5way_recall_at_1_image_to_text"
    (line,) = [line for line in shown.splitlines() if line.startswith(name)]
    values = [figure[name]["value"] for figure in figures]
    assert [float(word) for word in line.split()[1:3]] == [round(value, 4) for value in values]
    assert np.isclose(float(line.split()[3]), values[1] - values[0], atol=1e-4)


def test_training_evaluation_and_search_need_nothing_of_steps_1_to_3(prepared: Path) -> None:
    run, word = prepared / "runs" / "here", (prepared / "doc2vec" / "vocabulary.txt").read_text().splitlines()[3]
    for words in (
        ["train_cross_modal_retrieval_model.py", "1", "0.3", "0.2", *TINY, "--work", prepared],
        ["evaluate.py", "--run", run],
        ["search.py", "--run", run, word],
    ):
        command = [sys.executable, "-c", WITHOUT_STEPS_1_TO_3, str(ROOT), *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if words[0].startswith("train"):
            (trained,) = (prepared / "runs").iterdir()
            run.symlink_to(trained, target_is_directory=True)


def test_names_say_what_differs_from_the_config_file() -> None:
    words = [*TINY[:2], "--loss.tan_squared_alpha", "0.25", "--training.workers", "0", "--seed", "4"]
    settings, of_file, _ = parse_settings(make_parser(""), words)
    name = run_name(settings, of_file, Weights(1, 0.3, 0.2))
    assert name == f"{METHOD}-loss.tan_squared_alpha=0_25-seed=4"


# Interruption


def test_checkpoints_are_written_when_due_and_at_the_end(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    save = loop.save_checkpoint

    def noted(run: Path, trainer: Trainer, best: dict[str, object]) -> None:
        steps.append(trainer.progress.step)
        save(run, trainer, best)

    monkeypatch.setattr(loop, "save_checkpoint", noted)
    words = ["1", "0", "0", *TINY, "--work", str(prepared), "--training.max_epochs", "4"]
    words += ["--training.learning_rate", "0.1", "--training.select", "val_recall"]
    run = training.main(words)
    best, last = (torch.load(run / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert steps == [last["step"]] and best["epoch"] < last["epoch"] == 4
    seldom, batches = (run / "best.pt").read_bytes(), last["step"] // 4
    steps.clear()
    training.main([*words, "--overwrite", "--training.checkpoint_minutes", "1e-9"])
    assert steps == sorted([*range(1, 4 * batches + 1), *range(batches, 4 * batches + 1, batches)])
    assert (run / "best.pt").read_bytes() == seldom


def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    trained: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["1", "0.3", "0.2", *TINY, "--work", str(prepared), "--training.checkpoint_minutes", "1e-9"]
    whole_epoch = Trainer.train_one_epoch

    def stop_in_the_second(self: Trainer, board: object, *rest: object) -> None:
        if self.progress.epoch == 1:
            raise KeyboardInterrupt
        whole_epoch(self, board, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_one_epoch", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            training.main(words)
    unfinished = one_line_error(run_script(SCRIPT, *words, ok=False))
    assert "--resume" in unfinished
    assert "--overwrite" in unfinished
    (run,) = (prepared / "runs").iterdir()
    assert "unfinished" in one_line_error(run_script("evaluate.py", "--run", run, ok=False))
    assert torch.load(run / "last.pt", weights_only=True)["epoch"] == 1
    run_script(SCRIPT, *words, "--resume")
    before, after = weights_of(trained / "last.pt"), weights_of(run / "last.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for tag, points in scalars(run).items():
        steps = [step for step, _ in points]
        assert len(steps) == len(set(steps)), tag


def test_overwrite_starts_anew(prepared: Path) -> None:
    run = train(prepared)
    (run / "stray").write_text("from before")
    assert train(prepared, "--overwrite") == run
    assert not (run / "stray").exists()


def test_changed_inputs_and_settings_are_told(prepared: Path) -> None:
    run = train(prepared)
    words = [*"1 0.3 0.2".split(), *TINY, "--work", prepared]
    stale = one_line_error(run_script(SCRIPT, *words, "--neighbors.k", "4", ok=False))
    assert "knn_document_features.py" in stale
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["training"]["learning_rate"] = 0.5
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    changed = one_line_error(run_script(SCRIPT, *words, ok=False))
    assert "training.learning_rate 0.5" in changed
    assert "--overwrite" in changed
    assert "wrote" in run_script(SCRIPT, *words, "--refresh").stdout


# What users get wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1", "0.3"], "TEXT must be given"),
        (["1", "0.3", "-0.2"], ""),
        (["1", "0.3", "nan"], "the weight TEXT is nan"),
        (["1", "0.3", "0.2", "--training.batchsize", "3"], "did you mean training.batch_size?"),
        (["1", "0.3", "0.2", "--work", "/nowhere"], "run prepare_dataset.py"),
        (["1", "0.3", "0.2", "--training.batch_size", "0"], "training.batch_size"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(words: list[str], message: str) -> None:
    assert message in one_line_error(run_script(SCRIPT, *words, ok=False))


@pytest.mark.parametrize("script", [SCRIPT, "evaluate.py", "compare_runs.py"])
def test_help(script: str) -> None:
    assert "usage" in run_script(script, "--help").stdout


def test_evaluate_wants_a_run(tmp_path: Path) -> None:
    assert "--run must be given" in one_line_error(run_script("evaluate.py", ok=False))
    assert "no config.yaml" in one_line_error(run_script("evaluate.py", "--run", tmp_path, ok=False))


def test_evaluate_names_an_image_that_became_unreadable(prepared_once: Path, prepared: Path) -> None:
    run = train(prepared)
    table = pq.read_table(prepared / "pairs.parquet")
    tested = table.filter(pc.equal(table["split"], "test"))["image_path"][0].as_py()
    path = image_root(prepared) / tested
    saved, status = path.read_bytes(), path.stat()
    try:
        path.write_bytes(saved[:20])
        assert path.name in one_line_error(run_script("evaluate.py", "--run", run, "--force", ok=False))
    finally:
        path.write_bytes(saved)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_broken_checkpoint_is_named(trained: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained.parents[1], work)
    run = work / "runs" / trained.name
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:1000])
    assert "best.pt is no checkpoint" in one_line_error(run_script("evaluate.py", "--run", run, ok=False))


# What is computed


@pytest.mark.parametrize("weights", [Weights(1, 0.3, 0.2), Weights(0, 0, 0.2)])
def test_cached_features_train_as_pixels_do_flips_included(prepared: Path, weights: Weights) -> None:
    terms = []
    for cached in ("true", "false"):
        settings = settings_of(prepared, "--model.image.cache_features", cached)
        data, device = load_prepared(settings.work_folder, settings.model.text.max_words), torch.device("cpu")
        model = build_model(settings.model, np.load(prepared / "doc2vec" / "word_vectors.npy"), settings.seed)
        images = image_source(settings, data, device)
        trainer = build_trainer(settings, weights, data, model, images, device)
        plan = plan_epoch(data.rows["train"], trainer.objective.neighbors, 32, flip=True, seed=0, epoch=1)
        assert any(batch.flips.any() for batch in plan)
        model.eval()
        batches = images.batches([trainer.image_request(batch) for batch in plan])
        terms.append([trainer.terms(batch, pixels) for batch, pixels in zip(plan, batches, strict=True)])
    for with_cache, without in zip(*terms, strict=True):
        assert with_cache.keys() == without.keys()
        assert ("l_img" in with_cache) == bool(weights.img)
        assert ("l_text" in with_cache) == bool(weights.text)
        for name in with_cache:
            torch.testing.assert_close(with_cache[name], without[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["--loss.base", "struc"],
        ["--model.pvse.embeddings", "3"],
        ["--training.batches", "neighborhoods", "--model.pvse.embeddings", "2"],
    ],
)
def test_other_methods_train_too(prepared: Path, words: list[str]) -> None:
    run = train(prepared, *words)
    curves = scalars(run)
    losses = [value for _, value in curves["data/val_loss"]]
    assert min(losses[1:]) < losses[0]
    assert min(rate for _, rate in curves["speed/pairs_a_second"]) > 0
    terms = {"l_i2t": 1, "l_sym": 1, "l_img": 0.3, "l_text": 0.2}
    if "--loss.base" not in words:
        terms |= {"l_diversity": 0.1, "l_mmd": 0.01}
    total = sum(weight * np.array(curves[f"data/{name}"])[:, 1] for name, weight in terms.items())
    np.testing.assert_allclose(total, np.array(curves["data/train_loss"])[:, 1], rtol=1e-5)
    run_script("evaluate.py", "--run", run)


def test_pvse_trains_on_cached_local_features_as_on_pixels(prepared: Path) -> None:
    terms = []
    for cached in ("true", "false"):
        words = ["--model.pvse.embeddings", "2", "--model.image.cache_features", cached, "--model.image.size", "64"]
        settings = settings_of(prepared, *words)
        data, device = load_prepared(settings.work_folder, settings.model.text.max_words), torch.device("cpu")
        model = build_model(settings.model, np.load(prepared / "doc2vec" / "word_vectors.npy"), settings.seed)
        images = image_source(settings, data, device)
        trainer = build_trainer(settings, Weights(1, 0.3, 0.2), data, model, images, device)
        plan = plan_epoch(data.rows["train"], trainer.objective.neighbors, 32, flip=True, seed=0, epoch=1)[:2]
        model.eval()
        batches = images.batches([trainer.image_request(batch) for batch in plan])
        terms.append([trainer.terms(batch, pixels) for batch, pixels in zip(plan, batches, strict=True)])
    for with_cache, without in zip(*terms, strict=True):
        assert {"l_diversity", "l_mmd"} <= with_cache.keys() == without.keys()
        for name in with_cache:
            torch.testing.assert_close(with_cache[name], without[name], rtol=1e-3, atol=1e-4)


def several_captions(folder: Path) -> list[str]:
    """Flags of a made-up dataset in which an image has three texts."""
    run_script("prepare_dataset.py", *TINY, "--work", folder / "drawn")
    table = pq.read_table(folder / "drawn" / "pairs.parquet").to_pylist()
    root = str(image_root(folder / "drawn"))
    rows = [
        {"image": row["image_path"], "text": f"{other['text']} caption{number}"}
        for row in table[:110]
        for number, other in enumerate([other for other in table if other["category"] == row["category"]][:3])
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--dataset.source", "manifest", "--dataset.manifest", str(folder / "captions.jsonl")]
    return [*words, "--dataset.root", root, "--dataset.near_duplicates", "false", "--work", str(folder / "captions")]


def test_ground_truth_structure_takes_the_other_texts_of_an_image(tmp_path: Path) -> None:
    words = [*TINY, *several_captions(tmp_path)]
    for script in ("prepare_dataset.py", "train_doc2vec.py", "extract_doc2vec_vectors.py"):
        run_script(script, *words)
    truth = [*words, "--loss.base", "struc", "--loss.structure", "ground_truth"]
    run_script(SCRIPT, "1", "0", "0.1", *truth)  # and no neighbor table
    assert "IMG 0" in one_line_error(run_script(SCRIPT, "1", "0.1", "0", *truth, ok=False))
    assert "knn_document_features.py" in one_line_error(run_script(SCRIPT, "1", "0.3", "0.2", *words, ok=False))
    table = [*TINY, *words[2:], "--seeds", "1", "--tables", "2", "--training.max_epochs", "1"]
    shown = run_script("reproduce_tables.py", *table, "--out", tmp_path / "out").stdout
    assert "| STRUC (GT, Text) |" in shown


def test_ground_truth_structure_needs_several_texts(prepared: Path) -> None:
    words = [*TINY, "--work", prepared, "--loss.structure", "ground_truth"]
    assert "loss.base struc" in one_line_error(run_script(SCRIPT, "1", "0", "0.1", *words, ok=False))
    words += ["--loss.base", "struc"]
    assert "several texts an image" in one_line_error(run_script(SCRIPT, "1", "0", "0.1", *words, ok=False))


def test_the_schedule_decays_after_five_epochs_and_stops_after_ten(prepared: Path) -> None:
    settings = settings_of(prepared, "--training.max_epochs", "100")
    data, device = load_prepared(settings.work_folder, settings.model.text.max_words), torch.device("cpu")
    model = build_model(settings.model, np.load(prepared / "doc2vec" / "word_vectors.npy"), settings.seed)
    trainer = build_trainer(settings, Weights(1, 0, 0), data, model, image_source(settings, data, device), device)
    rates = []
    progress = trainer.progress
    while not trainer.finished():
        progress.epoch += 1
        improved = progress.epoch <= 2
        if improved:
            progress.best_loss, progress.best_epoch = 1.0 / progress.epoch, progress.epoch
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.schedule.step(1.0 / progress.epoch if improved else 1.0)
    first = settings.training.learning_rate
    assert np.allclose(rates, [first] * 7 + [first / 10] * 5)


def test_a_run_is_named_by_its_user(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["1", "0", "0", *TINY, "--work", str(prepared), "--training.max_epochs", "1"]
    run = training.main([*words, "--name", "monday"])
    assert run == prepared / "runs" / "monday" and (run / "best.pt").is_file()
    printed = capsys.readouterr().out
    assert "* marks the lowest val loss so far" in printed
    for name in ("../monday", ".hidden", "a/b", "x" * 151):
        with pytest.raises(UserError, match="--name must begin with a letter or digit"):
            training.main([*words, "--name", name])


def test_an_epochs_recall_is_named_by_what_is_measured(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(prepared, "--evaluation.kway", "[5,1000]")
    data, device = load_prepared(settings.work_folder, settings.model.text.max_words), torch.device("cpu")
    model = build_model(settings.model, np.load(prepared / "doc2vec" / "word_vectors.npy"), settings.seed)
    trainer = build_trainer(settings, Weights(1, 0, 0), data, model, image_source(settings, data, device), device)
    images = len(np.unique(data.image_ids[data.rows["val"]]))
    ways = ("image_to_text", "text_to_image")
    assert [metric.name for metric in trainer.metrics] == [
        f"{k}way_recall_at_1_{way}" for k in (5, images) for way in ways
    ]
    assert f"an epoch's Recall@1 is {images}-way and not 1000-way" in capsys.readouterr().out


def test_the_papers_model_trains_end_to_end(prepared: Path) -> None:
    run = train(
        prepared,
        *("--model.image.backbone", "resnet18", "--model.image.weights", "none", "--model.image.trainable", "true"),
        *("--model.text.encoder", "gru", "--training.precision", "bf16", "--training.workers", "1"),
    )
    losses = [value for _, value in scalars(run)["data/val_loss"]]
    assert min(losses[1:]) < losses[0]
    run_script("evaluate.py", "--run", run)


COMPILED = [
    *("--model.image.backbone", "resnet18", "--model.image.weights", "none", "--model.image.trainable", "true"),
    *("--training.compile", "true"),
]


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile takes a C++ compiler: g++")
def test_a_compiled_backbone_trains_as_one_that_is_not(prepared: Path) -> None:
    found, names = [], []
    for words in (COMPILED, COMPILED[:-2]):
        settings = settings_of(prepared, *words)
        data, device = load_prepared(settings.work_folder, settings.model.text.max_words), torch.device("cpu")
        model = build_model(settings.model, np.load(prepared / "doc2vec" / "word_vectors.npy"), settings.seed)
        images = image_source(settings, data, device)
        trainer = build_trainer(settings, Weights(1, 0.3, 0.2), data, model.train(), images, device)
        plan = plan_epoch(data.rows["train"], trainer.objective.neighbors, 32, flip=True, seed=0, epoch=1)[:3]
        torch.manual_seed(0)
        for batch, pixels in zip(plan, images.batches([trainer.image_request(batch) for batch in plan]), strict=True):
            terms = trainer.terms(batch, pixels)
            found.append(torch.stack(list(terms.values())).detach())
            sum(terms.values()).backward()
            trainer.optimizer.step()
        names.append(model.checkpoint().keys())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert names[0] == names[1]
    for step, tolerance in enumerate((1e-4, 0.02, 0.02)):  # Adam's first steps go by the signs of the gradients
        torch.testing.assert_close(found[step], found[3 + step], rtol=tolerance, atol=0)
    assert not torch.allclose(found[0], found[2], rtol=0.02)


def test_a_compiler_that_is_missing_is_told(prepared: Path, tmp_path: Path) -> None:
    nothing = {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = ["1", "0", "0", *TINY, "--work", prepared, *COMPILED]
    told = one_line_error(run_script(SCRIPT, *words, ok=False, **nothing))
    assert "No working C++ compiler found" in told and "g++, or leave out training.compile" in told
    run_script(SCRIPT, *words[:-2], "--resume")


def test_a_hinge_that_nothing_reaches_is_told(prepared: Path) -> None:
    words = ["--loss.form", "hinge", "--loss.tan_squared_alpha", "5", "--training.max_epochs", "1"]
    done = run_script(SCRIPT, "1", "0", "0", *TINY, "--work", prepared, *words)
    assert "no triplet of the batch" in done.stdout
    assert "lower loss.tan_squared_alpha" in done.stdout
    assert "loss.margin" not in done.stdout
    words = [*words[:2], *words[4:], "--training.batches", "neighborhoods"]
    done = run_script(SCRIPT, "1", "0", "0", *TINY, "--work", prepared, *words)
    assert "no triplet of the batch" not in done.stdout
    assert "batches are random" in done.stdout  # no neighbor is needed
