"""What evaluate.py measures, on embeddings made up here, and a metric that is added through the registry alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import train_cross_modal_retrieval_model as training
from metrics import METRICS, EmbeddedPairs, Metric, NotMeasurable, Scores
from pipeline.schema import Evaluation, Settings
from reporting.evaluation import measure
from reporting.figures import read_metrics


@pytest.mark.slow
def test_unrelated_embeddings_score_what_stands_beside_as_chance() -> None:
    evaluation = Settings().evaluation
    evaluation.kway, evaluation.bootstrap = [5, 50], 1
    rng = np.random.default_rng(0)
    image_ids = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    categories = np.array([0] * 15 + [1] * 10 + [-1] * 5)[image_ids]
    evaluation.preservation_k = 10
    values = []
    for _ in range(150):
        x = torch.from_numpy(rng.normal(size=(30, 6)).astype(np.float32))[image_ids]
        y = torch.from_numpy(rng.normal(size=(len(image_ids), 6)).astype(np.float32))
        reference = rng.normal(size=(30, 6))[image_ids] + 0.1 * rng.normal(size=(len(image_ids), 6))
        pairs = EmbeddedPairs(x, y, image_ids, categories, reference, evaluation.preservation_k)
        figures, _ = measure(pairs, evaluation, seed=0)
        values.append([figure["value"] for figure in figures.values()])
    errors = np.std(values, axis=0) / np.sqrt(len(values))
    names = list(figures)
    assert {"preservation_10_images", "map_text_to_image", "recall_at_10_image_to_text"} <= set(names)
    for name, mean, error in zip(names, np.mean(values, axis=0), errors, strict=True):
        chance = figures[name]["chance"]
        # The median of a few ranks of a skewed distribution lies above the distribution's.
        room = chance / 10 if name.startswith("median") else 4 * error + 1e-9
        assert abs(mean - chance) <= room, name


def distances_of_pairs(_: Evaluation) -> Iterator[Metric]:
    """A toy: the squared distance of every pair, the lower the better."""

    def compute(pairs: EmbeddedPairs) -> Scores:
        return Scores((pairs.images - pairs.texts).square().sum(dim=1).numpy().astype(float))

    yield Metric(
        "distance",
        "distance of the pairs",
        "image_to_text",
        compute,
        chance=lambda pairs: 2.0,
        higher_is_better=False,
        is_share=False,
        every_epoch=True,
    )


def test_a_metric_is_added_through_the_registry_alone(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METRICS, "distance", distances_of_pairs)
    run = training.main(["1", "0.3", "0.2", *TINY, "--work", str(prepared), "--training.max_epochs", "1"])
    evaluate.main(["--run", str(run)])
    figure = json.loads((run / "metrics.json").read_text())["figures"]["distance_image_to_text"]
    assert 0 < figure["low"] <= figure["value"] <= figure["high"] < 4 and figure["chance"] == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("distance_image_to_text")]
    assert float(line.split()[1]) == round(figure["value"], 4)
    events = EventAccumulator(str(run)).Reload()
    assert len(events.Scalars("val/distance_image_to_text")) == 2  # before training, and after the epoch
    (scalar,) = events.Scalars("test/distance_image_to_text")
    assert scalar.value == pytest.approx(figure["value"])


def test_a_metric_that_is_not_measurable_is_left_out_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def undefined(pairs: EmbeddedPairs) -> float:
        raise NotMeasurable("nothing to measure")

    monkeypatch.setitem(
        METRICS, "undefined", lambda _: [Metric("no", "No", way, undefined, undefined) for way in ("images", "texts")]
    )
    x, evaluation = torch.eye(10), Settings().evaluation
    evaluation.kway = [2, 4]
    pairs = EmbeddedPairs(x, x, np.arange(10), np.full(10, -1), x.numpy(), preservation_k=200)
    figures, scores = measure(pairs, evaluation, seed=0)
    assert not {"no_images", "no_texts", "map_image_to_text", "preservation_200_images"} & set(figures)
    assert {"preservation_1_percent_images", "median_rank_image_to_text"} <= set(figures)
    assert set(scores) == set(figures)
    assert capsys.readouterr().out.splitlines() == [
        "Recall@10 is left out: the gallery has no more items",
        "neighborhood preservation of 200 neighbors is left out: there are 10 pairs",
        "mAP is left out: no pair has a category",
        "nothing to measure",
    ]


def test_nothing_is_measured_on_two_test_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.eye(2)
    pairs = EmbeddedPairs(x, x, np.arange(2), np.full(2, -1), x.numpy())
    assert measure(pairs, Settings().evaluation, seed=0) == ({}, {})
    assert capsys.readouterr().out.startswith("warning: the split has 2 images with a known word, and no figure means")


def test_a_k_above_the_gallery_is_named_by_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """12 images of two texts each: 24 texts are candidates for an image, and 12 images for a text."""
    image_ids = np.repeat(np.arange(12), 2)
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(24, 6)).astype(np.float32)) for _ in range(2))
    x = x[image_ids]
    evaluation = Evaluation(kway=[5, 12, 20, 100], bootstrap=1, preservation_k=3)
    pairs = EmbeddedPairs(x, y, image_ids, np.full(24, -1), rng.normal(size=(24, 6)), 3)
    figures, _ = measure(pairs, evaluation, seed=0)
    names = [name for name in figures if "way" in name]
    assert names == [
        "5way_recall_at_1_image_to_text",
        "5way_recall_at_1_text_to_image",
        "12way_recall_at_1_image_to_text",
        "12way_recall_at_1_text_to_image",
        "20way_recall_at_1_image_to_text",
        "23way_recall_at_1_image_to_text",
    ]
    assert figures["12way_recall_at_1_text_to_image"]["chance"] == pytest.approx(1 / 12)
    assert figures["23way_recall_at_1_image_to_text"]["chance"] == pytest.approx(1 / 23)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: the gallery is too small for 20-way Recall@1, text to image; 12-way Recall@1 is measured",
        "warning: the gallery is too small for 100-way Recall@1, image to text; 23-way Recall@1 is measured",
        "warning: the gallery is too small for 100-way Recall@1, text to image; 12-way Recall@1 is measured",
    ]


def test_titles_of_what_was_measured_in_place_of_a_larger_k(tmp_path: Path) -> None:
    stamp = {"settings": {"evaluation.kway": [5, 100]}}
    (tmp_path / "evaluate.json").write_text(json.dumps(stamp))
    (tmp_path / "metrics.json").write_text(json.dumps({"figures": {"23way_recall_at_1_image_to_text": {}}}))
    assert read_metrics(tmp_path)["23way_recall_at_1_image_to_text"].title == "23-way Recall@1, image to text"
