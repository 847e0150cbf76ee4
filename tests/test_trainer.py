"""Step 4's trainer without a dataset: its checkpoints, and when it warns that a hinge has no gradient."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import artifacts
import train_cross_modal_retrieval_model as training
from config import Settings
from datasets import BatchPlan
from runs import Weights


def warning(
    capsys: pytest.CaptureFixture[str],
    base: str,
    form: str,
    terms: dict[str, float],
    image_ids: tuple[int, ...] = (1, 2),
) -> str:
    settings = Settings()
    settings.loss.base, settings.loss.form = base, form
    trainer = object.__new__(training.Trainer)
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
    trainer = object.__new__(training.Trainer)
    trainer.model = SimpleNamespace(checkpoint=lambda: {"weight": torch.arange(5.0)})
    trainer.epoch, trainer.step = 1, 2
    for number in (12, 34567):
        monkeypatch.setattr(artifacts.os, "getpid", lambda number=number: number)
        trainer.save(tmp_path / f"{number}" / "best.pt")
    assert (tmp_path / "12" / "best.pt").read_bytes() == (tmp_path / "34567" / "best.pt").read_bytes()
    assert torch.load(tmp_path / "12" / "best.pt", weights_only=True)["step"] == 2
