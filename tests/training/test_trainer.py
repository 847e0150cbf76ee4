"""Step 4's trainer on made-up embeddings: its checkpoints, neighborhood batches, lost images."""

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_losses import LOGSUMEXP, loop_of, unit_vectors

import train_cross_modal_retrieval_model as script
from datasets import BatchPlan, NeighborTable
from pipeline.errors import UserError
from pipeline.schema import Settings
from training import distributed
from training.checkpoints import load_model_state, write_state
from training.lost_images import LostImages
from training.objective import Objective, build_objective
from training.runs import Weights
from training.trainer import Trainer
from training.validation import validation_loss


def test_a_checkpoint_has_nothing_of_the_process_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (12, 34567):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        write_state(tmp_path / f"{number}" / "best.pt", {"model": {"weight": torch.arange(5.0)}, "step": 2})
    assert (tmp_path / "12" / "best.pt").read_bytes() == (tmp_path / "34567" / "best.pt").read_bytes()
    assert torch.load(tmp_path / "12" / "best.pt", weights_only=True)["step"] == 2


def test_a_flipped_bit_in_a_checkpoint_is_told(tmp_path: Path) -> None:
    path, chance, loaded = tmp_path / "best.pt", random.Random(0), []
    model: Any = SimpleNamespace(load_checkpoint=loaded.append)
    write_state(path, {"model": {"weight": torch.arange(50.0)}, "epoch": 1, "step": 2, "seconds": 3.0})
    content, wanted, told = path.read_bytes(), load_model_state(path, model), 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_model_state(path, model)
        except UserError as error:
            assert "--overwrite" in str(error)
            told += 1
        else:
            assert str(found) == str(wanted)
    assert told > 50


# Neighborhood batches

X, Y = unit_vectors(20, 4, seed=1), unit_vectors(20, 4, seed=2)
LISTS = {0: [1, 3], 1: [0], 2: [4], 3: [2], 4: [], 5: [0, 4], 6: [5], 7: [], 8: [6], 9: []}
"""Neighbors by pair; the pairs 0 and 7 share an image id."""


class KnownEmbeddings(torch.nn.Module):
    """A model that knows the embeddings of each image and text by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.images = SimpleNamespace(trainable=False)
        self.passed: list[tuple[int, int]] = []

    def forward(self, images: torch.Tensor, tokens: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.passed.append((len(images), len(tokens)))
        return X[images], Y[tokens]


def neighborhood_trainer(*lost: int) -> Trainer:
    """A trainer of neighborhood batches on ten pairs; the images `lost` cannot be read."""
    data: Any = SimpleNamespace(
        image_ids=np.array([0, 1, 2, 3, 4, 5, 6, 0, 8, 9]),
        images=SimpleNamespace(of_pair=np.arange(10), paths=list(range(10))),
        rows={"train": np.arange(10), "val": np.arange(10)},
        read=SimpleNamespace(texts=lambda rows: (torch.from_numpy(rows), torch.ones(len(rows)))),
    )
    settings = Settings(seed=3)
    settings.training.max_unreadable_share = 0.5
    objective = build_objective(settings, Weights(1, 0, 0), data, torch.device("cpu"))
    objective.weights |= {"l_img": 0.3, "l_text": 0.2}
    objective.neighbors, objective.within_batch = table(data), True
    images: Any = SimpleNamespace(unreadable={number: f"{number} is lost" for number in lost})
    model: Any = KnownEmbeddings()
    return Trainer(settings.training, objective, model, images, data, torch.device("cpu"), seed=3, metrics=[])


def table(data: Any) -> NeighborTable:
    indices = np.array([[*line, -1, -1][:2] for line in LISTS.values()], dtype=np.int32)
    return NeighborTable(np.arange(10), indices, data.image_ids)


def expected_terms(
    rows: list[int], positives: dict[int, int], image_ids: list[int], lost: tuple[int, ...] = ()
) -> dict[str, float]:
    """Eq. 3, 4, 6 and 7 of a batch of pairs, and the positives of those that have one, triplet by triplet."""
    x, y, place = X[rows], Y[rows], torch.tensor([rows.index(positives.get(row, row)) for row in rows])
    others, of_images, of_texts = (torch.zeros(len(rows), len(rows), dtype=torch.bool) for _ in range(3))
    for i, a in enumerate(rows):
        for j, n in enumerate(rows):
            others[i, j] = image_ids[a] != image_ids[n] and n not in LISTS[a] and a not in LISTS[n]
            others[i, j] &= a not in lost and n not in lost
            of_texts[i, j] = others[i, j] and a in positives and image_ids[n] != image_ids[positives[a]]
            of_images[i, j] = of_texts[i, j] and positives[a] not in lost
    return {
        "l_i2t": loop_of(LOGSUMEXP, x, y, y, others),
        "l_sym": loop_of(LOGSUMEXP, y, x, x, others),
        "l_img": loop_of(LOGSUMEXP, x, x[place], x, of_images),
        "l_text": loop_of(LOGSUMEXP, y, y[place], y, of_texts),
    }


def test_positives_of_a_neighborhood_batch_are_its_own_pairs() -> None:
    trainer, none = neighborhood_trainer(), np.zeros(7, dtype=bool)
    batch = BatchPlan(np.array([0, 1, 3, 2, 5, 4, 7]), np.array([1, 0, 2, 4, 0, -1, -1]), none, none)
    numbers, flips = trainer.image_request(batch)
    assert numbers.tolist() == batch.rows.tolist() and len(flips) == 7  # no neighbors beside them
    terms = trainer.terms(batch, torch.from_numpy(numbers))
    assert trainer.model.passed == [(7, 7)]
    expected = expected_terms(batch.rows.tolist(), {0: 1, 1: 0, 3: 2, 2: 4, 5: 0}, trainer.data.image_ids.tolist())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


def test_a_pair_whose_image_is_lost_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, none = neighborhood_trainer(1), np.zeros(5, dtype=bool)
    batch = BatchPlan(np.array([0, 1, 3, 2, 5]), np.array([1, 0, 2, -1, 0]), none, none)
    terms = trainer.terms(batch, torch.from_numpy(batch.rows))
    expected = expected_terms(batch.rows.tolist(), {0: 1, 1: 0, 3: 2, 5: 0}, trainer.data.image_ids.tolist(), (1,))
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    trainer.terms(batch, torch.from_numpy(batch.rows))
    assert (
        capsys.readouterr().out.count("1 is lost; its pairs are left out of the loss") == 1 and len(trainer.lost) == 1
    )


def test_too_many_lost_images_stop_the_training() -> None:
    images: Any = SimpleNamespace(unreadable={number: f"{number} is lost" for number in range(6)})
    with pytest.raises(UserError, match=r"0 is lost \(the first of 6 of 10 images"):
        LostImages(images, 10, 0.5).warn()


@pytest.mark.parametrize(("batches", "smallest"), [("random", 4), ("neighborhoods", 5)])
def test_every_process_gets_two_pairs_of_a_batch(monkeypatch: pytest.MonkeyPatch, batches: str, smallest: int) -> None:
    """A neighborhood batch may be one pair smaller than training.batch_size."""
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    script.demand_enough_pairs(smallest, batches, 100)
    with pytest.raises(UserError, match=f"training.batch_size {smallest - 1} of 100 train pairs is too small"):
        script.demand_enough_pairs(smallest - 1, batches, 100)


# The hint


def hint(base: str, form: str, terms: dict[str, float], image_ids: tuple[int, ...] = (1, 2)) -> str | None:
    settings = Settings()
    settings.loss.base, settings.loss.form = base, form
    data: Any = None
    objective: Objective = build_objective(settings, Weights(1, 0, 0), data, torch.device("cpu"))
    objective.weights["l_img"] = 0.5
    named = {name: torch.tensor(value) for name, value in terms.items()}
    return objective.hint_if_inactive(named, np.array(image_ids))


NONE = {"l_i2t": 0.0, "l_sym": 0.0, "l_img": 0.0}


def test_the_setting_that_applies_is_named() -> None:
    assert hint("angular", "hinge", NONE) == "lower loss.tan_squared_alpha"
    for base in ("triplet", "struc"):
        assert hint(base, "logsumexp", NONE) == "raise loss.margin"


def test_a_batch_that_has_a_gradient_or_no_negative_is_no_reason_to_warn() -> None:
    assert not hint("angular", "hinge", NONE | {"l_img": 0.1})
    assert not hint("angular", "hinge", NONE | {"l_sym": 0.1})
    assert not hint("angular", "hinge", NONE, image_ids=(3,))
    assert not hint("angular", "hinge", NONE, image_ids=(3, 3, 3))
    assert not hint("angular", "logsumexp", NONE)


# Choices of the authors' code


def test_the_validation_loss_may_be_that_of_image_to_text_alone() -> None:
    data: Any = None
    x, y, ids = X[:6], Y[:6], torch.arange(6)
    found = {}
    for name in ("i2t_sym", "i2t"):
        settings = Settings()
        settings.training.val_loss = name
        objective = build_objective(settings, Weights(1, 0, 0), data, torch.device("cpu"))
        found[name] = objective.validation_loss(x, y, np.arange(6), ids).item()
    there, back = LOGSUMEXP(x, y, y).item(), LOGSUMEXP(y, x, x).item()
    assert found["i2t"] == pytest.approx(there, rel=1e-6)
    assert found["i2t_sym"] == pytest.approx(there + back, rel=1e-6)
    assert there != pytest.approx(back, rel=1e-3)


def test_a_last_validation_batch_of_one_pair_joins_the_batch_before() -> None:
    data: Any = None
    objective = build_objective(Settings(), Weights(1, 0, 0), data, torch.device("cpu"))
    rows, ids = np.arange(9), torch.arange(9)

    def loss(start: int, end: int) -> float:
        return objective.validation_loss(X[start:end], Y[start:end], rows[start:end], ids[start:end]).item()

    found = validation_loss(objective, X[:9], Y[:9], rows, ids, 4)
    assert found == pytest.approx((4 * loss(0, 4) + 5 * loss(4, 9)) / 9)
    assert loss(8, 9) == 0 and found != pytest.approx((4 * loss(0, 4) + 4 * loss(4, 8)) / 9, rel=1e-3)
    even = validation_loss(objective, X[:8], Y[:8], rows[:8], ids[:8], 4)
    assert even == pytest.approx((loss(0, 4) + loss(4, 8)) / 2)
    assert validation_loss(objective, X[:3], Y[:3], rows[:3], ids[:3], 1) == 0


@pytest.mark.parametrize("patience", [5, 6])
def test_the_learning_rate_decays_in_the_epoch_of_decay_patience(patience: int) -> None:
    trainer = neighborhood_trainer()
    settings = Settings()
    settings.training.decay_patience = patience
    trainer = Trainer(
        settings.training,
        trainer.objective,
        trainer.model,
        trainer.images,
        trainer.data,
        torch.device("cpu"),
        seed=0,
        metrics=[],
    )
    rates = []
    for loss in [1.0, *[2.0] * patience]:
        trainer.schedule.step(loss)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[:-1] == [1e-4] * patience and rates[-1] == pytest.approx(1e-5)


class CountingPasses(KnownEmbeddings):
    """It also keeps in how many passes the images were to be encoded."""

    def __init__(self, *, trainable: bool) -> None:
        super().__init__()
        self.images.trainable = trainable
        self.passes: list[int] = []

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, _: torch.Tensor, passes: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.passes.append(passes)
        return super().forward(images, tokens, _)


@pytest.mark.parametrize(
    ("passes", "trainable", "img", "expected"),
    [("one", True, 0.3, 1), ("two", True, 0.3, 2), ("two", False, 0.3, 1), ("two", True, 0.0, 1)],
)
def test_neighbors_images_take_a_pass_of_their_own_where_the_backbone_is_trained(
    passes: str, trainable: bool, img: float, expected: int
) -> None:
    trainer = neighborhood_trainer()
    trainer.objective.within_batch, trainer.objective.weights["l_img"] = False, img
    trainer.training.passes = passes
    counting: Any = CountingPasses(trainable=trainable)
    trainer.model = trainer.parallel = counting
    batch = trainer.plan()[0]
    trainer.terms(batch, torch.from_numpy(trainer.image_request(batch)[0]))
    assert counting.passes == [expected]
    assert counting.passed[0][0] == len(batch.rows) * (2 if img else 1)
