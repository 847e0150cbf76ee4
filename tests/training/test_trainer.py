"""Step 4's trainer without a dataset: its checkpoints, and when it warns that a hinge has no gradient."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_losses import LOGSUMEXP, loop_of, unit_vectors

import train_cross_modal_retrieval_model as training
from datasets import BatchPlan, Neighbors
from pipeline.errors import UserError
from pipeline.settings import Settings
from training.runs import Weights
from training.trainer import Trainer, make_loss_terms


def warning(
    capsys: pytest.CaptureFixture[str],
    base: str,
    form: str,
    terms: dict[str, float],
    image_ids: tuple[int, ...] = (1, 2),
) -> str:
    settings = Settings()
    settings.loss.base, settings.loss.form = base, form
    trainer = object.__new__(Trainer)
    trainer.settings, trainer.weights, trainer.step = settings, Weights(1, 0.5, 0), 7
    trainer.pairwise = None
    trainer.term_weights = trainer.weights.of_terms()
    trainer.data = SimpleNamespace(image_ids=np.array(image_ids))
    rows = np.arange(len(image_ids))
    board = SimpleNamespace(add_scalar=lambda *_: None)
    named = {name: torch.tensor(value) for name, value in terms.items()}
    trainer.log_losses(board, BatchPlan(rows, rows, rows > 0, rows > 0), named)
    return capsys.readouterr().out


NONE = {"l_i2t": 0.0, "l_sym": 0.0, "l_img": 0.0}


def test_the_setting_that_applies_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    told = warning(capsys, "angular", "hinge", NONE)
    assert "step 7 is active" in told and "lower loss.tan_squared_alpha" in told and "margin" not in told
    for base in ("triplet", "struc"):
        told = warning(capsys, base, "logsumexp", NONE)
        assert "raise loss.margin" in told and "alpha" not in told


def test_a_batch_that_has_a_gradient_or_no_negative_is_no_reason_to_warn(capsys: pytest.CaptureFixture[str]) -> None:
    assert not warning(capsys, "angular", "hinge", NONE | {"l_img": 0.1})
    assert not warning(capsys, "angular", "hinge", NONE | {"l_sym": 0.1})
    assert not warning(capsys, "angular", "hinge", NONE, image_ids=(3,))
    assert not warning(capsys, "angular", "hinge", NONE, image_ids=(3, 3, 3))
    assert not warning(capsys, "angular", "logsumexp", NONE)


def test_a_checkpoint_has_nothing_of_the_process_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = object.__new__(Trainer)
    trainer.model = SimpleNamespace(checkpoint=lambda: {"weight": torch.arange(5.0)})
    trainer.epoch, trainer.step = 1, 2
    for number in (12, 34567):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        trainer.save(tmp_path / f"{number}" / "best.pt")
    assert (tmp_path / "12" / "best.pt").read_bytes() == (tmp_path / "34567" / "best.pt").read_bytes()
    assert torch.load(tmp_path / "12" / "best.pt", weights_only=True)["step"] == 2


# Neighborhood batches


class Numbers:
    """Images whose pixels are their numbers."""

    def __init__(self, *lost: int) -> None:
        self.unreadable = {number: f"{number} is lost" for number in lost}

    def load(self, numbers: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers)


X, Y = unit_vectors(20, 4, seed=1), unit_vectors(20, 4, seed=2)
LISTS = {0: [1, 3], 1: [0], 2: [4], 3: [2], 4: [], 5: [0, 4], 6: [5], 7: [], 8: [6], 9: []}
"""Neighbors by pair; the pairs 0 and 7 share an image id."""


def neighborhood_trainer(*lost: int) -> Trainer:
    """A trainer of neighborhood batches whose model knows the embeddings of each image and text by its number."""
    trainer = object.__new__(Trainer)
    trainer.settings, trainer.weights, trainer.epoch = Settings(seed=3), Weights(1, 0.3, 0.2), 1
    trainer.settings.training.max_unreadable_share = 0.5
    trainer.device, trainer.told, trainer.pairwise = torch.device("cpu"), set(), None
    trainer.images, trainer.term_weights = Numbers(*lost), trainer.weights.of_terms()
    trainer.within_batch = trainer.neighbor_texts = True
    trainer.neighbors = object.__new__(Neighbors)
    trainer.neighbors.rows, trainer.neighbors.anywhere = np.arange(10), None
    trainer.neighbors.indices = np.array([[*line, -1, -1][:2] for line in LISTS.values()], dtype=np.int32)
    trainer.data = SimpleNamespace(
        image_ids=np.array([0, 1, 2, 3, 4, 5, 6, 0, 8, 9]),
        images=SimpleNamespace(of_pair=np.arange(10), paths=list(range(10))),
        rows={"train": np.arange(10)},
        texts=lambda rows: (torch.from_numpy(rows), torch.ones(len(rows))),
    )
    trainer.loss_terms = make_loss_terms(trainer.settings.loss)
    trainer.model = trainer.parallel = lambda images, tokens, lengths: (X[images], Y[tokens])
    return trainer


def expected_terms(rows: list[int], positives: dict[int, int], image_ids: list[int]) -> dict[str, float]:
    """Eq. 3, 4, 6 and 7 of a batch of pairs, and the positives of those that have one, triplet by triplet."""
    x, y, place = X[rows], Y[rows], torch.tensor([rows.index(positives.get(row, row)) for row in rows])
    others, within = (torch.zeros(len(rows), len(rows), dtype=torch.bool) for _ in range(2))
    for i, a in enumerate(rows):
        for j, n in enumerate(rows):
            others[i, j] = image_ids[a] != image_ids[n] and n not in LISTS[a] and a not in LISTS[n]
            within[i, j] = others[i, j] and a in positives and image_ids[n] != image_ids[positives[a]]
    return {
        "l_i2t": loop_of(LOGSUMEXP, x, y, y, others),
        "l_sym": loop_of(LOGSUMEXP, y, x, x, others),
        "l_img": loop_of(LOGSUMEXP, x, x[place], x, within),
        "l_text": loop_of(LOGSUMEXP, y, y[place], y, within),
    }


def test_positives_of_a_neighborhood_batch_are_its_own_pairs() -> None:
    trainer, none = neighborhood_trainer(), np.zeros(7, dtype=bool)
    batch = BatchPlan(np.array([0, 1, 3, 2, 5, 4, 7]), np.array([1, 0, 2, 4, 0, -1, -1]), none, none)
    ((numbers, flips),) = trainer.image_requests([batch])
    assert numbers.tolist() == batch.rows.tolist() and len(flips) == 7  # and no neighbors beside them
    assert trainer.readable(batch, torch.from_numpy(numbers))[0] is batch
    model, passed = trainer.parallel, []
    trainer.parallel = lambda images, tokens, lengths: passed.append((images, tokens)) or model(images, tokens, lengths)
    terms = trainer.losses(batch, torch.from_numpy(numbers))
    assert [(len(images), len(tokens)) for images, tokens in passed] == [(7, 7)]
    expected = expected_terms(batch.rows.tolist(), {0: 1, 1: 0, 3: 2, 2: 4, 5: 0}, trainer.data.image_ids.tolist())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


def test_a_neighbor_whose_image_is_lost_is_no_positive() -> None:
    trainer, none = neighborhood_trainer(1), np.zeros(5, dtype=bool)
    batch = BatchPlan(np.array([0, 1, 3, 2, 5]), np.array([1, 0, 2, -1, 0]), none, none)
    new, numbers = trainer.readable(batch, torch.from_numpy(batch.rows))
    taken = int(new.rows[1])
    assert taken != 1 and numbers.tolist() == new.rows.tolist() and batch.rows[1] == 1
    assert new.neighbors.tolist()[2:] == [2, -1, 0] and new.neighbors[0] == 1  # planned, and not there any more
    positives = {3: 2, 5: 0}
    if new.neighbors[1] in new.rows:  # of the pair that took the place, drawn from all of its list
        positives[taken] = int(new.neighbors[1])
    terms = trainer.losses(new, numbers)
    expected = expected_terms(new.rows.tolist(), positives, trainer.data.image_ids.tolist())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


@pytest.mark.parametrize(("batches", "smallest"), [("random", 4), ("neighborhoods", 5)])
def test_every_process_gets_two_pairs_of_a_batch(monkeypatch: pytest.MonkeyPatch, batches: str, smallest: int) -> None:
    """A neighborhood batch may be one pair smaller than training.batch_size."""
    settings = Settings()
    settings.training.batches = batches
    monkeypatch.setattr(training.distributed, "processes", lambda: 2)
    settings.training.batch_size = smallest
    training.demand_enough_pairs(settings, 100)
    settings.training.batch_size = smallest - 1
    with pytest.raises(UserError, match=f"training.batch_size {smallest - 1} of 100 train pairs is too small"):
        training.demand_enough_pairs(settings, 100)
