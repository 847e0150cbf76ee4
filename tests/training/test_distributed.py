"""Several processes that train together: the loss and the gradients of one, its files, stops and resumption."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_script
from test_survival import command, copy_of, the_run
from test_training import scalars, weights_of

import train_cross_modal_retrieval_model as training
from datasets import Prepared, plan_epoch
from images.files import UnreadableImage
from images.loading import FeatureSource, PixelSource
from models import build_model
from pipeline.command_line import Stopped
from pipeline.errors import UserError
from pipeline.schema import Settings
from pipeline.steps import FIND_NEIGHBORS, output_paths
from training import distributed
from training.runs import Weights
from training.trainer import Trainer, build_trainer, own_share

SCRIPT = "train_cross_modal_retrieval_model.py"


def _process(rank: int, count: int, folder: Path, function: Callable[..., Any], *words: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.save(function(*words), folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_processes(count: int, folder: Path, function: Callable[..., Any], *words: Any) -> list[Any]:
    """What `function`, of this file, gives in each of several processes that are connected."""
    folder.mkdir()
    torch.multiprocessing.spawn(_process, (count, folder, function, *words), count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


# The joined batch

SHAPES = [(1, 7, 4), (2, 5, 4), (2, 3, 2, 4)]  # blocks, rows of the batch, and an embedding's


def gathered() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch joined from the processes' shares of it, and the gradient of this process's share."""
    results = []
    for shape in SHAPES:
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        mine = whole[:, distributed.share(shape[1])].flatten(0, 1).requires_grad_()
        joined = distributed.gather_with_gradient(mine, distributed.shares(shape[1]))
        joined.cumsum(0).square().sum().backward()  # each row's gradient depends on the others and their order
        results.append((joined.detach(), mine.grad))
    return results


def messages() -> list[Any]:
    """What the processes tell each other."""
    rank = distributed.rank()

    def fails(where: int) -> int:
        if rank == where:
            raise UserError(f"wrong in {where}")
        return rank

    told: list[Any] = [distributed.reduce_max(rank, 5 - rank), distributed.by_writer(lambda: fails(1))]
    told += [distributed.all_or_none(lambda: fails(9)), distributed.gather_objects(rank)]
    for attempt in (lambda: distributed.by_writer(lambda: fails(0)), lambda: distributed.all_or_none(lambda: fails(1))):
        with pytest.raises(UserError) as raised:
            attempt()
        told.append(str(raised.value))
    return told


def prepared_in(work: Path) -> tuple[Settings, Prepared]:
    """15 made-up train pairs of 12 images, whose neighbor table is in WORK."""
    settings, pairs = Settings(work=str(work)), 15
    settings.model.image.weights, settings.model.image.backbone = "none", "resnet18"
    settings.model.image.size, settings.model.image.trainable = 32, False
    settings.model.dimensions, settings.model.text.hidden_size, settings.model.text.dropout = 8, 6, 0.0
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, size=pairs)
    image = np.minimum(np.arange(pairs), 11)
    data = Prepared(
        tokens=rng.integers(3, 20, size=lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        images=SimpleNamespace(of_pair=image, paths=[f"{number}.png" for number in range(12)]),
        image_ids=image,
        categories=image % 3,
        category_names=["a", "b", "c"],
        rows={split: np.arange(pairs) for split in ("train", "val", "test")},
        unused={},
    )
    indices = np.stack([rng.permutation(np.delete(np.arange(pairs), row))[:4] for row in range(pairs)])
    indices[9] = -1  # a pair without a neighbor
    arrays = (np.arange(pairs), indices, np.zeros((pairs, 4)))
    if distributed.processes() == 1:
        for path, array in zip(output_paths(FIND_NEIGHBORS, settings), arrays, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    return settings, data


METHODS = ("gru", "bag_of_words", "struc", "pvse", "fine_grained")


def gradients(work: Path) -> dict[str, tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """For each method the loss terms and the parameters' gradients of a batch of 15 pairs."""
    results = {}
    for method in METHODS:
        settings, data = prepared_in(work)
        settings.model.text.encoder = "gru" if method == "gru" else "bag_of_words"
        settings.loss.base = method if method in ("struc", "fine_grained") else "angular"
        settings.loss.labels, settings.siamese.relevance = "equal", "neighbors"
        settings.model.pvse.embeddings = 2 if method == "pvse" else 0
        weights = Weights(0 if method == "fine_grained" else 1, 0.3, 0.2)
        rng = np.random.default_rng(1)
        model = build_model(settings.model, rng.normal(size=(20, 5)).astype(np.float32), settings.seed)
        features = rng.normal(size=(12, 2, 4, 512) if method == "pvse" else (12, 2, 512)).astype(np.float32)
        source = FeatureSource(features, torch.device("cpu"))
        trainer = build_trainer(settings, weights, data, model, source, torch.device("cpu"))
        (batch,) = plan_epoch(data.rows["train"], trainer.objective.neighbors, 15, flip=True, seed=0, epoch=1)
        assert (batch.neighbors < 0).any() and batch.flips.any()
        images = source.load(*trainer.image_request(own_share(batch)))
        model.train()
        terms = trainer.terms(batch, images)
        trainer.objective.total(terms).backward()
        of_parameters = {name: part.grad for name, part in model.named_parameters() if part.requires_grad}
        results[method] = ({name: term.item() for name, term in terms.items()}, of_parameters)
    return results


class Files:
    """Images that are their number; some cannot be read."""

    size = 1
    unreadable: ClassVar[dict[int, str]] = {}

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> torch.Tensor:
        if number in (2, 7):
            raise UnreadableImage(f"{number} is lost")
        return torch.full((3, 1, 1), number, dtype=torch.uint8)

    def __getitems__(self, numbers: list[int]) -> tuple[torch.Tensor, dict[int, str]]:
        lost = {number: f"{number} is lost" for number in numbers if number in (2, 7)}
        return torch.stack([torch.full((3, 1, 1), number, dtype=torch.uint8) for number in numbers]), lost


def masked(work: Path) -> tuple[list[bool], list[bool], dict[int, str]]:
    """Which pairs and drawn neighbors of a batch have an image, and what is known to be lost."""
    settings, data = prepared_in(work)
    settings.training.max_unreadable_share = 0.5
    model = build_model(settings.model, np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32), settings.seed)
    source = PixelSource(Files(), 0, torch.device("cpu"))
    trainer = build_trainer(settings, Weights(1, 0.3, 0.2), data, model, source, torch.device("cpu"))
    (batch,) = plan_epoch(data.rows["train"], trainer.objective.neighbors, 15, flip=True, seed=0, epoch=1)
    list(source.batches([trainer.image_request(own_share(batch))]))
    told = trainer.objective_batch(batch)
    assert told.readable is not None and told.neighbor_readable is not None
    return told.readable.tolist(), told.neighbor_readable.tolist(), source.unreadable


def all_of_it(work: Path) -> list[Any]:
    return [gathered(), messages(), gradients(work), masked(work)]


@pytest.mark.slow
def test_two_processes_compute_what_one_does_with_the_joined_batch(tmp_path: Path) -> None:
    one = [gathered(), None, gradients(tmp_path / "work"), masked(tmp_path / "work")]
    two = in_processes(2, tmp_path / "two", all_of_it, tmp_path / "work")
    for shape, (whole, gradient), *parts in zip(SHAPES, one[0], *(each[0] for each in two), strict=True):
        assert all(torch.equal(whole, joined) for joined, _ in parts)
        mine = [part.unflatten(0, (shape[0], -1)) for _, part in parts]
        assert len(mine[0]) == len(mine[1]) and mine[0].shape[1] == mine[1].shape[1] + 1
        torch.testing.assert_close(torch.cat(mine, dim=1).flatten(0, 1), 2 * gradient)  # of which DDP takes the mean

    for rank, each in enumerate(two):
        assert each[1] == [[1, 5], 0, rank, [0, 1], "wrong in 0", "wrong in 1"]

    for method in METHODS:
        terms, of_parameters = one[2][method]
        wanted = {"l_i2t", "l_sym", "l_img", "l_text"} if method != "fine_grained" else {"l_i2t", "l_img", "l_text"}
        assert terms.keys() == wanted | ({"l_diversity", "l_mmd"} if method == "pvse" else set())
        for rank in range(2):
            told, found = two[rank][2][method]
            assert told == pytest.approx(terms, rel=1e-6), method
            assert found.keys() == of_parameters.keys() and len(found) > 3
            for name, gradient in of_parameters.items():
                assert gradient.abs().max() > 1e-5, (method, name)
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=f"{method} {name}")

    readable, _, lost = one[3]
    assert lost.keys() == {2, 7} and not all(readable)
    for each in two:
        assert each[3] == one[3]


def test_the_last_batch_has_two_pairs_for_each_process() -> None:
    for pairs, processes, sizes in ((10, 1, [4, 4, 2]), (10, 2, [4, 6]), (12, 2, [4, 4, 4]), (9, 1, [4, 5])):
        plan = plan_epoch(np.arange(pairs), None, 4, flip=False, seed=0, epoch=1, processes=processes)
        assert [len(batch.rows) for batch in plan] == sizes


# Whole runs


def torchrun(*words: str, script: Path = ROOT / SCRIPT) -> subprocess.CompletedProcess[str]:
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*started, *words], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_torchrun_ends_as_one_process_does(prepared_once: Path, tmp_path: Path) -> None:
    one, two = (copy_of(prepared_once, tmp_path / name) for name in ("one", "two"))
    plain = ["--model.text.dropout", "0"]
    shown = run_script(SCRIPT, *command(one, *plain)).stdout
    done = torchrun(*command(two, *plain))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.replace(str(two), str(one)).replace(", in 2 processes", "") for line in done.stdout.splitlines()]
    assert [line[:20] for line in lines] == [line[:20] for line in shown.splitlines()]  # each line once
    runs = the_run(one), the_run(two)
    assert runs[0].name == runs[1].name
    first, second = (weights_of(run / "best.pt") for run in runs)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-4)
    ended = [json.loads((run / "run.json").read_text()) for run in runs]
    assert ended[0]["best_val_loss"] == pytest.approx(ended[1]["best_val_loss"], abs=1e-4)
    first, second = (scalars(run) for run in runs)
    assert first.keys() == second.keys()
    for tag in first:
        assert [step for step, _ in first[tag]] == [step for step, _ in second[tag]], tag
    told = torchrun(*command(two, *plain, "--training.batch_size", "3"))
    assert told.returncode != 0 and told.stderr.count("Traceback") == 1  # torchrun's own
    assert told.stderr.count(f"{SCRIPT}: training.batch_size 3 of") == 1


FAILS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.command_line import run_script
from pipeline.errors import UserError
from training import distributed

def main(argv=None):
    with distributed.started():
        distributed.reduce_max(0)
        if distributed.rank() == 1:
            raise UserError("row 7 is damaged")
        distributed.reduce_max(0)

run_script(main)
"""


@pytest.mark.slow
def test_an_error_of_one_process_is_said(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    told = torchrun(script=tmp_path / "fails.py")
    assert told.returncode != 0 and told.stderr.count("Traceback") == 1  # torchrun's own
    assert told.stderr.count("fails.py: row 7 is damaged") == 1


def stopped(work: Path) -> str:
    """Train, with a SIGTERM to the last process in the middle of the second epoch; returns what is said."""
    untouched = Trainer.terms

    def signalled(self: Trainer, *rest: Any) -> dict[str, torch.Tensor]:
        if self.progress.step == 5 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return untouched(self, *rest)

    Trainer.terms = signalled
    try:
        training.main(command(work))
    except Stopped as told:
        return str(told)
    finally:
        Trainer.terms = untouched
    return "ended"


def undisturbed_and_resumed(works: list[Path]) -> str:
    training.main(command(works[0]))
    told = stopped(works[1])
    with pytest.raises(UserError, match="--resume"):
        training.main(command(works[1]))
    training.main(command(works[1], "--resume"))
    return told


@pytest.mark.slow
def test_stopped_and_resumed_processes_end_as_undisturbed_ones(prepared_once: Path, tmp_path: Path) -> None:
    works = [copy_of(prepared_once, tmp_path / name) for name in ("whole", "stopped")]
    told = in_processes(2, tmp_path / "two", undisturbed_and_resumed, works)
    assert told == ["stopped after step 6; go on with --resume"] * 2
    for name in ("best.pt", "last.pt"):
        whole, resumed = (weights_of(the_run(work) / name) for work in works)
        assert all(torch.equal(whole[part], resumed[part]) for part in whole), name
    first, second = (scalars(the_run(work)) for work in works)
    for tag in first.keys() - {"speed/pairs_a_second"}:
        assert first[tag] == second[tag], tag
    states = torch.load(the_run(works[0]) / "last.pt", weights_only=True)
    assert not torch.equal(states["random"]["cpu"], states["random_of_others"][0]["cpu"])  # each has its own dropout


@pytest.mark.slow
def test_another_number_of_processes_goes_on_and_says_so(
    prepared_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = copy_of(prepared_once, tmp_path / "work")
    in_processes(2, tmp_path / "two", stopped, work)
    training.main(command(work, "--resume"))
    assert "2 processes began epoch 2, 1 resume it" in capsys.readouterr().out
    assert (the_run(work) / "run.json").exists()
