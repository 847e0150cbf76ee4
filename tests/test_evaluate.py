"""What evaluate.py measures, on embeddings made up here."""

from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from datasets import Prepared
from pipeline.pairs import Images
from pipeline.settings import Settings


def prepared(image_ids: np.ndarray, categories: np.ndarray) -> Prepared:
    """Test pairs alone."""
    pairs = len(image_ids)
    return Prepared(
        images=Images([f"{number}.png" for number in range(pairs)], image_ids, Path()),
        image_ids=image_ids,
        categories=categories,
        category_names=["one", "other", "third"],
        tokens=np.zeros(0, dtype=np.int32),
        offsets=np.zeros(pairs + 1, dtype=np.int64),
        rows={"test": np.arange(pairs)},
        unused={"test": 0},
    )


@pytest.mark.slow
def test_unrelated_embeddings_score_what_stands_beside_as_chance() -> None:
    settings = Settings()
    settings.evaluation.kway, settings.evaluation.sampled_repeats = [5, 50], 0
    settings.evaluation.preservation_k, settings.evaluation.bootstrap = 10, 1
    rng = np.random.default_rng(0)
    image_ids = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    data = prepared(image_ids, np.array([0] * 15 + [1] * 10 + [-1] * 5)[image_ids])
    rows = np.arange(len(image_ids))
    values = []
    for _ in range(150):
        x = torch.from_numpy(rng.normal(size=(30, 6)).astype(np.float32))[image_ids]
        y = torch.from_numpy(rng.normal(size=(len(rows), 6)).astype(np.float32))
        reference = rng.normal(size=(30, 6))[image_ids] + 0.1 * rng.normal(size=(len(rows), 6))
        figures, _ = evaluate.measure(x, y, reference, data, rows, settings)
        values.append([figure["value"] for figure in figures.values()])
    errors = np.std(values, axis=0) / np.sqrt(len(values))
    names = list(figures)
    assert {"preservation_10_images", "map_text_to_image", "recall_at_10_image_to_text"} <= set(names)
    for name, mean, error in zip(names, np.mean(values, axis=0), errors, strict=True):
        chance = figures[name]["chance"]
        # The median of a few ranks of a skewed distribution lies above the distribution's.
        room = chance / 10 if name.startswith("median") else 4 * error + 1e-9
        assert abs(mean - chance) <= room, name
