"""What was done is kept, whatever happens: kills, signals, full disks, lost images, losses that are not finite."""

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, one_line_error, run_script
from test_training import SCRIPT, scalars, weights_of

from pipeline.command_line import make_parser, parse_settings
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.pairs import image_root
from pipeline.steps import EXTRACT_DOC2VEC, FIND_NEIGHBORS, PREPARE, TRAIN_DOC2VEC, Step, output_paths
from training.loop import StopRequest

STEPS = (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC, FIND_NEIGHBORS)
MIDWAY = ["--training.checkpoint_minutes", "1e-9"]  # a checkpoint after every batch


def command(work: Path, *words: str) -> list[str]:
    return ["1", "0.3", "0.2", *TINY, "--work", str(work), *words]


def killed(script: str, words: list[str], call: int) -> subprocess.CompletedProcess[str]:
    """Start a script and kill it at one of its calls; 0 lets it end."""
    done = run_script("tests/killed.py", str(call), script, *words, ok=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done


def copy_of(work: Path, target: Path) -> Path:
    return Path(shutil.copytree(work, target, ignore=shutil.ignore_patterns("*.png")))


def the_run(work: Path) -> Path:
    (run,) = (work / "runs").iterdir()
    return run


def demand_same_run(run: Path, undisturbed: Path) -> None:
    """Equal weights bit for bit, and equal curves with no step twice; how fast it went may differ."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = weights_of(run / name), weights_of(undisturbed / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = scalars(run), scalars(undisturbed)
    speed = "speed/pairs_a_second"
    assert {step for step, _ in ours.pop(speed)} <= {step for step, _ in theirs.pop(speed)}
    assert ours == theirs
    for tag, points in ours.items():
        assert len({step for step, _ in points}) == len(points), tag


# Kills


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--training.checkpoint_minutes", "10"],  # none before the end
        ["--model.image.cache_features", "false", "--training.workers", "1", "--loss.base", "triplet"],
        ["--training.batches", "neighborhoods"],
    ],
)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    prepared_once: Path, tmp_path: Path, settings: list[str]
) -> None:
    undisturbed = copy_of(prepared_once, tmp_path / "undisturbed")
    calls = int(killed(SCRIPT, command(undisturbed, *MIDWAY, *settings), 0).stdout.split()[-1])
    rng = np.random.default_rng(0)
    kills, tries = 0, 0
    while kills < (10 if not settings else 3):
        tries += 1
        work = copy_of(prepared_once, tmp_path / f"{tries}")
        done = killed(SCRIPT, command(work, *MIDWAY, *settings), int(rng.integers(1, calls)))
        while done.returncode:
            kills += 1
            moment = int(rng.integers(1, 2 * calls))  # or never: without a checkpoint each try begins anew
            done = killed(SCRIPT, command(work, *MIDWAY, *settings, "--resume"), moment)
        demand_same_run(the_run(work), the_run(undisturbed))


@pytest.mark.slow
def test_steps_0_to_3_killed_at_random_moments_write_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    work = tmp_path / "work"  # one path for both: the pair table names the images' root
    words = [*TINY, "--dataset.near_duplicates", "true", "--work", str(work)]
    calls = [int(killed(step.script, words, 0).stdout.split()[-1]) for step in STEPS]
    undisturbed = [[path.read_bytes() for path in outputs(step, work)] for step in STEPS]
    shutil.rmtree(work)
    for step, count, wanted in zip(STEPS, calls, undisturbed, strict=True):
        for _ in range(3):
            killed(step.script, words, int(rng.integers(1, count)))
        run_script(step.script, *words)
        for path, content in zip(outputs(step, work), wanted, strict=True):
            assert path.read_bytes() == content, path
    assert not list(work.rglob("*.part*"))


def outputs(step: Step, work: Path) -> list[Path]:
    return output_paths(step, parse_settings(make_parser(""), [*TINY, "--work", str(work)])[0])


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_started_it(kill: signal.Signals) -> None:
    pool = "from pipeline import processes; p = processes.process_pool(); "
    pool += "print(*{p.submit(processes.os.getpid).result() for _ in range(9)}, flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", pool], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout
    workers = [os.pidfd_open(int(number)) for number in parent.stdout.readline().split()]
    assert workers
    parent.send_signal(kill)
    parent.wait()
    for worker in workers:
        ended, _, _ = select.select([worker], [], [], 60)
        os.close(worker)
        assert ended


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_first(prepared_once: Path, tmp_path: Path, asked: signal.Signals) -> None:
    undisturbed, work = (copy_of(prepared_once, tmp_path / name) for name in ("undisturbed", "work"))
    run_script(SCRIPT, *command(undisturbed))
    long = [sys.executable, str(ROOT / SCRIPT), *command(work, "--training.max_epochs", "100000")]
    long += ["--training.stop_patience", "100000"]
    with subprocess.Popen(long, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        while not process.stdout.readline().startswith("epoch   1"):
            assert process.poll() is None
        process.send_signal(asked)
        told = process.stderr.read()
        assert process.wait() == 128 + asked
    assert told.startswith(f"{SCRIPT}: stopped after step") and told.endswith("; go on with --resume\n")
    state = torch.load(the_run(work) / "last.pt", weights_only=True)
    assert state["step"] == int(told.split("step ")[1].split(";")[0]) >= 4


def test_a_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # who asks twice still gets a checkpoint
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Full disks


def full_disk(size: int) -> Callable[[], None]:
    """For a child process: no file may grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_on_full_disk(script: str, size: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=full_disk(size),
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.script)
def test_a_full_disk_ends_a_step_in_one_line_and_leaves_the_old_files(
    prepared_once: Path, tmp_path: Path, step: Step
) -> None:
    work = copy_of(prepared_once, tmp_path / "work")
    before = {path: path.read_bytes() for path in outputs(step, work)}
    smallest = min(len(content) for content in before.values() if len(content) > 1000)
    words = [*TINY, "--work", work, "--seed", "1"]
    told = one_line_error(run_on_full_disk(step.script, smallest // 2, *words))
    assert "File too large" in told and str(work) in told
    left = {path: path.read_bytes() for path in outputs(step, work)}
    assert any(left[path] == before[path] for path in before)
    assert not list(work.rglob("*.part*"))
    run_script(step.script, *words)


@pytest.mark.slow
def test_a_full_disk_ends_training_in_one_line_and_it_goes_on_later(prepared_once: Path, tmp_path: Path) -> None:
    undisturbed, work = (copy_of(prepared_once, tmp_path / name) for name in ("undisturbed", "work"))
    run_script(SCRIPT, *command(undisturbed))
    checkpoint = (the_run(undisturbed) / "last.pt").stat().st_size
    for size in (checkpoint // 2, 3000, 1000):
        resume = ["--resume"] if (work / "runs").exists() else []
        assert "File too large" in one_line_error(run_on_full_disk(SCRIPT, size, *command(work, *resume)))
    run_script(SCRIPT, *command(work, "--resume"))
    demand_same_run(the_run(work), the_run(undisturbed))


# Two writers


def test_the_second_writer_is_told_who_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = "from pathlib import Path; import sys; from pipeline import files; sys.argv[0] = 'first.py'\n"
    hold += f"with files.lock(Path({str(tmp_path)!r})): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout and first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"first\.py \(process {first.pid} on .*\) is at work in"), lock(tmp_path):
            pass
        said = []

        def end_first(text: str, **_: object) -> None:
            said.append(text)
            assert first.stdin
            first.stdin.close()

        monkeypatch.setattr("pipeline.files.print", end_first, raising=False)
        with lock(tmp_path, wait=True):
            assert f"first.py (process {first.pid} on" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "words"), [("train_doc2vec.py", []), (SCRIPT, ["1", "0", "0"])])
def test_two_processes_on_one_folder(prepared: Path, script: str, words: list[str]) -> None:
    folder = prepared if script != SCRIPT else prepared / "runs" / "l_i2t_l_sym_1_l_img_0_l_text_0-seed=0"
    command = [*words, *TINY, "--work", prepared]
    with lock(folder):
        told = one_line_error(run_script(script, *command, *([] if words else ["--seed", "1"]), ok=False))
    assert f"(process {os.getpid()} on" in told and f"is at work in {folder}" in told


# Lost images


@pytest.fixture
def with_pixels(tmp_path: Path) -> Iterator[Path]:
    """WORK after steps 0 to 3 on a dataset of its own, whose images may be broken."""
    work = tmp_path / "own"
    for script in [step.script for step in STEPS]:
        run_script(script, *TINY, "--work", work)
    yield work


def break_images(work: Path, share: float, split: str = "train") -> list[Path]:
    table = pq.read_table(work / "pairs.parquet", columns=["image_path", "split"]).to_pylist()
    names = sorted({row["image_path"] for row in table if row["split"] == split})
    paths = [image_root(work) / name for name in names[: max(1, int(share * len(names)))]]
    for path in paths:
        path.write_bytes(path.read_bytes()[:20])
    return paths


PIXELS = ["--model.image.cache_features", "false"]


@pytest.mark.slow
@pytest.mark.parametrize("source", [[], PIXELS, [*PIXELS, "--training.workers", "2"]])
@pytest.mark.parametrize("split", ["train", "val"])
def test_lost_images_are_named_counted_and_left_out(with_pixels: Path, source: list[str], split: str) -> None:
    paths = break_images(with_pixels, 0.01, split)
    done = run_script(SCRIPT, *command(with_pixels, *source))
    for path in paths:
        assert f"warning: {path} was readable when it was prepared" in done.stdout
    counts = scalars(the_run(with_pixels))["data/unreadable_images"]
    assert counts[-1] == (8, len(paths))


@pytest.mark.slow
@pytest.mark.parametrize("source", [[], PIXELS])
def test_too_many_lost_images_stop_the_run_with_a_summary(with_pixels: Path, source: list[str]) -> None:
    paths = break_images(with_pixels, 0.5)
    told = one_line_error(run_script(SCRIPT, *command(with_pixels, *source), ok=False))
    assert any(str(path) in told for path in paths)
    assert "of 160 images" in told and "training.max_unreadable_share allows 1.00%" in told
    run_script(SCRIPT, *command(with_pixels, *source, "--resume", "--training.max_unreadable_share", "0.9"))


# Losses that are not finite


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(prepared: Path) -> None:
    words = command(prepared, "--training.learning_rate", "1e30", "--training.log_every", "3")
    told = one_line_error(run_script(SCRIPT, *words, ok=False))
    path = the_run(prepared) / "non_finite_batch.json"
    assert f"is NaN or infinite; the batch's pairs are in {path}" in told
    batch = json.loads(path.read_text())
    train = np.load(prepared / "neighbors" / "doc2vec" / "rows.npy")
    assert len(batch["pairs"]) == len(batch["neighbors"]) == 32 and np.isin(batch["pairs"], train).all()
    assert not np.isfinite([float(value) for value in batch["losses"].values()]).all()
    assert not (the_run(prepared) / "last.pt").exists()


# Workers


def test_a_worker_that_is_killed_ends_in_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch.utils.data; from pipeline import command_line\n"
        "class Killed(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, number): os.kill(os.getpid(), signal.SIGKILL)\n"
        "command_line.run_script(lambda: list(torch.utils.data.DataLoader(Killed(), num_workers=1)))\n"
    )
    told = one_line_error(run_script(str(script), ok=False))
    assert "lower training.workers" in told
