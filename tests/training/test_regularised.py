"""What goes beyond the paper in step 4: dropout on image features, soft targets, InfoNCE, the epoch by Recall@1."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line_error, run_script
from test_losses import unit_vectors
from test_training import SCRIPT, scalars, settings_of, train, weights_of
from torch import nn

import losses
import train_cross_modal_retrieval_model as script
from datasets import NeighborTable, other_pairs
from models import ImageEncoder
from pipeline.files import read_json
from pipeline.schema import Loss, Settings, Training
from training.objective import Objective, ObjectiveBatch
from training.runs import Weights, reads_neighbors, soft_share

ROWS = np.array([0, 1, 2, 3, 5])
IDS = np.array([0, 1, 2, 3, 9, 0])
LISTS = np.array([[1, 3], [2, -1], [0, 1], [5, 2], [3, 1]])


def test_neighbors_in_the_batch_are_positives_without_a_further_pass() -> None:
    """W is mutual: 0 lists 1 and 3, and 2 lists 0; so all three are positives of 0."""
    table = NeighborTable(ROWS, LISTS, IDS)
    objective = Objective(
        terms=lambda x, y, ids, **more: losses.retrieval_loss_terms(losses.infonce_loss, x, y, ids, **more),
        weights={"l_i2t": 1.0, "l_sym": 1.0, "l_img": 0.0, "l_text": 0.0},
        neighbors=table,
        within_batch=False,
        soft_share=0.6,
        pairwise=None,
        lists_neighbors=False,
        val_terms=("l_i2t", "l_sym"),
        hint=None,
    )
    assert not objective.with_neighbor_images and not objective.with_neighbor_texts
    x, y = unit_vectors(4, 6, seed=1), unit_vectors(4, 6, seed=2)
    rows = np.array([0, 1, 2, 5])
    ids = torch.from_numpy(IDS[rows])
    batch = ObjectiveBatch(rows, rows, ids, np.full(4, -1), ids)
    near = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    negatives = torch.tensor(
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool
    )  # 0 and 5 share
    terms = objective(x, y, batch)
    targets = losses.soft_targets(near, 0.6)
    torch.testing.assert_close(terms["l_i2t"], losses.infonce_loss(x, y, y, negatives, targets=targets))
    torch.testing.assert_close(terms["l_sym"], losses.infonce_loss(y, x, x, negatives, targets=targets))
    lost = torch.tensor([True, False, True, True])
    batch.readable, batch.neighbor_readable = lost, lost
    values = []
    for seed in (3, 4):
        x[1], y[1] = unit_vectors(2, 6, seed=seed)
        values.append(objective.total(objective(x, y, batch)))
    torch.testing.assert_close(*values)


def test_the_control_has_other_images_and_as_many_neighbors() -> None:
    many = np.where(LISTS >= 0, LISTS, -1).repeat(50, axis=1)
    drawn = other_pairs(many, ROWS, IDS)
    assert ((drawn >= 0) <= (many >= 0)).all() and set(drawn[0][drawn[0] >= 0]) == {1, 2, 3}
    assert set(drawn[2][drawn[2] >= 0]) == {0, 1, 3, 5}
    np.testing.assert_array_equal(drawn, other_pairs(many, ROWS, IDS))


def test_dropout_is_on_the_features_in_training_alone() -> None:
    settings = Settings().model.image.model_copy(
        update={"backbone": "efficientnet_lite0", "weights": "none", "trainable": False, "dropout": 0.5}
    )
    encoder = ImageEncoder(settings, 8)
    features = torch.ones(2000, encoder.backbone.features)
    nn.init.constant_(encoder.project.weight, 1.0)
    nn.init.zeros_(encoder.project.bias)
    seen: list[torch.Tensor] = []
    encoder.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for training in (True, False):
        encoder.train(training)
        encoder(features)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0} and abs((seen[0] == 0).float().mean() - 0.5) < 0.01
    assert torch.equal(seen[1], features)


@pytest.mark.parametrize(
    ("base", "share"), [("angular", 0.5), ("infonce", 0.5), ("triplet", 0.0), ("struc", 0.0), ("fine_grained", 0.0)]
)
def test_losses_without_several_positives_ignore_soft_targets(base: str, share: float) -> None:
    """A config file may hold settings that nothing reads."""
    settings = Settings(loss=Loss(base=base, soft_targets=0.5))
    assert soft_share(settings) == share
    if base in ("triplet", "struc"):
        assert not reads_neighbors(settings, Weights(1, 0, 0))


@pytest.mark.slow
def test_a_config_with_soft_targets_trains_with_the_triplet_loss(prepared: Path, tmp_path: Path) -> None:
    config = tmp_path / "soft.yaml"
    config.write_text((ROOT / "tests" / "tiny.yaml").read_text() + "\nloss:\n  soft_targets: 0.5\n")
    words = ["--config", config, "--work", prepared, "--loss.base", "triplet", "--training.max_epochs", "1"]
    run_script(SCRIPT, *"1 0.1 0.3".split(), *words)


@pytest.mark.parametrize(
    ("select", "words"),
    [("val_loss", "* marks the lowest val loss"), ("val_recall", "* marks the highest 7-way Recall@1")],
)
def test_what_the_star_marks_is_said(select: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = SimpleNamespace(
        training=Training(select=select, select_k=7),
        objective=SimpleNamespace(within_batch=False),
        model=nn.Linear(2, 2),
        data=SimpleNamespace(rows={"train": ROWS, "val": ROWS}),
        device="cpu",
    )
    script.say_what_is_trained(trainer, Path("run"))
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_the_epoch_is_chosen_by_recall_where_the_setting_says_so(prepared: Path) -> None:
    words = "--loss.base infonce --loss.soft_targets 0.5 --model.image.dropout 0.5 --training.max_epochs 6".split()
    run = train(prepared, *words, "--training.select", "val_recall", "--training.select_k", "3", weights="1 0 0")
    curves, made = scalars(run), read_json(run / "run.json")
    ways = [curves[f"val/3way_recall_at_1_{way}"] for way in ("image_to_text", "text_to_image")]
    recalls = [(a[1] + b[1]) / 2 for a, b in zip(*ways, strict=True)][1:]
    assert made["best_epoch"] == 1 + recalls.index(max(recalls))
    assert made["val_recall_at_1"] == pytest.approx(max(recalls))
    losses_ = [value for _, value in curves["data/val_loss"]][1:]
    assert made["best_val_loss"] == pytest.approx(losses_[made["best_epoch"] - 1], rel=1e-5)
    run_script("evaluate.py", "--run", run)
    by_loss = train(prepared, *words, weights="1 0 0")
    chosen = read_json(by_loss / "run.json")
    losses_ = [value for _, value in scalars(by_loss)["data/val_loss"]][1:]
    assert chosen["best_epoch"] == 1 + losses_.index(min(losses_))
    again = train(
        prepared, *words, "--training.select", "val_recall", "--training.select_k", "3", "--overwrite", weights="1 0 0"
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights_of(run / "best.pt").values(), weights_of(again / "best.pt").values(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.soft_targets", "0.5", "--loss.form", "hinge"], "loss.form hinge goes with loss.soft_targets 0"),
        (["--loss.soft_targets", "0.5", "--loss.base", "triplet"], "loss.soft_targets is 0.5, which nothing reads"),
        (["--loss.temperature", "0.5"], "loss.temperature is 0.5, which nothing reads"),
        (["--model.image.dropout", "0.5", "--model.pvse.embeddings", "2"], "model.image.dropout is 0.5, which nothing"),
        (["--training.select_k", "1"], "training.select_k"),
    ],
)
def test_settings_that_contradict(words: list[str], message: str) -> None:
    assert message in one_line_error(run_script(SCRIPT, "1", "0", "0", *words, ok=False))


@pytest.mark.slow
def test_soft_targets_need_the_neighbors_of_step_3(prepared: Path) -> None:
    (prepared / "neighbors" / "doc2vec" / "indices.npy").unlink()
    words = ["--work", prepared, "--loss.soft_targets", "0.5"]
    done = run_script(SCRIPT, *"1 0 0".split(), "--config", ROOT / "tests" / "tiny.yaml", *words, ok=False)
    assert "knn_document_features.py" in one_line_error(done)
    assert settings_of(prepared, "--loss.soft_targets", "0.5").loss.soft_targets == 0.5
