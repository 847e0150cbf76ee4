"""What evaluate.py measures, on embeddings made up here."""

import numpy as np
import pytest
import torch

import evaluate
from metrics import EmbeddedPairs
from pipeline.settings import Settings


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
        figures, _ = evaluate.measure(pairs, evaluation, seed=0)
        values.append([figure["value"] for figure in figures.values()])
    errors = np.std(values, axis=0) / np.sqrt(len(values))
    names = list(figures)
    assert {"preservation_10_images", "map_text_to_image", "recall_at_10_image_to_text"} <= set(names)
    for name, mean, error in zip(names, np.mean(values, axis=0), errors, strict=True):
        chance = figures[name]["chance"]
        # The median of a few ranks of a skewed distribution lies above the distribution's.
        room = chance / 10 if name.startswith("median") else 4 * error + 1e-9
        assert abs(mean - chance) <= room, name
