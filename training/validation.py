"""What is measured on the validation split after every epoch."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import Prepared
from metrics import EmbeddedPairs, Metric
from training.objective import Objective

SHORT = {"image_to_text": "i2t", "text_to_image": "t2i"}
"""Directions in the line of an epoch."""


class Validation(NamedTuple):
    """The validation loss, and the metrics by label and direction."""

    loss: float
    measured: dict[str, dict[str, float]]

    def __str__(self) -> str:
        return f"val loss {self.loss:.4f}  {', '.join(map(_in_words, self.measured.items()))}"


def _in_words(of_label: tuple[str, dict[str, float]]) -> str:
    """`5-way Recall@1 i2t 0.801 t2i 0.798`: a metric of the two ways, or of images and texts."""
    label, values = of_label
    return " ".join([label, *(f"{SHORT.get(direction, direction)} {value:.3f}" for direction, value in values.items())])


@torch.no_grad()
def validation_loss(objective: Objective, x: Tensor, y: Tensor, rows: np.ndarray, ids: Tensor, size: int) -> float:
    """The mean loss of the pairs `rows` (R,) in batches of `size`, in their order.

    A last batch of one pair would add 0, as it has no negatives. It joins the batch before, as in training.
    x, y: (R, D) or (R, K, D), embeddings of their images and texts. ids: (R,), their image_ids.
    """
    total, starts = 0.0, list(range(0, len(rows), size))
    if size > 1 and len(starts) > 1 and len(rows) - starts[-1] == 1:
        starts.pop()
    for part in map(slice, starts, [*starts[1:], len(rows)]):
        total += objective.validation_loss(x[part], y[part], rows[part], ids[part]).item() * len(ids[part])
    return total / len(rows)


def measure(metrics: Iterable[Metric], x: Tensor, y: Tensor, rows: np.ndarray, data: Prepared) -> dict[str, float]:
    """Every metric of the pairs `rows` (R,) by name. x, y: as for `validation_loss`."""
    pairs = EmbeddedPairs(x, y, data.image_ids[rows], data.categories[rows])
    return {metric.name: metric.value(metric.compute(pairs)) for metric in metrics}
