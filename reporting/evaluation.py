"""What evaluate.py measures of embedded pairs, prints, and shows in TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import metrics
from metrics import EmbeddedPairs
from pipeline.schema import Evaluation
from reporting.figures import Figure, bootstrap_interval
from reporting.precision_curves import Curves


def measure(pairs: EmbeddedPairs, evaluation: Evaluation, seed: int) -> tuple[dict[str, Figure], dict[str, np.ndarray]]:
    """Every metric's value, 95 % interval and value by chance; and what each pair scored in those that score pairs.

    Metrics that are not defined on these pairs are left out; why is printed. seed: of the bootstrap.
    """
    figures: dict[str, Figure] = {}
    scores_of_pairs: dict[str, np.ndarray] = {}
    left_out: list[str] = []
    asked_for = metrics.registered(evaluation).values()
    for asked in tqdm(asked_for, desc="measuring", unit="metric", leave=False, disable=None):
        metric = asked.as_measured(pairs) if asked.as_measured else asked
        if metric.name != asked.name:
            left_out.append(f"warning: the gallery is too small for {asked.title}; {metric.label} is measured")
        if metric.name in figures:
            continue
        try:
            scores = metric.compute(pairs)
        except metrics.NotMeasurable as why:
            left_out.append(str(why))
            continue
        chance = metric.chance(pairs)
        if not isinstance(scores, metrics.Scores):
            figures[metric.name] = {"value": scores, "chance": chance}
            continue
        groups = pairs.groups if scores.groups is None else scores.groups
        low, high = bootstrap_interval(scores.values, groups, resamples=evaluation.bootstrap, seed=seed)
        figures[metric.name] = {"value": float(scores.values.mean()), "low": low, "high": high, "chance": chance}
        if scores.groups is None:
            scores_of_pairs[metric.name] = scores.values
    for reason in dict.fromkeys(left_out):
        print(reason)
    return figures, scores_of_pairs


def print_table(figures: Mapping[str, Figure]) -> None:
    """The figures, a line each."""
    width = max(map(len, figures))
    print(f"{'':{width}}   value   95 % interval    chance")
    for name, figure in figures.items():
        interval = f"{figure['low']:.4f} {figure['high']:.4f}" if "low" in figure else " " * 13
        value = f"{figure['value']:.4f}" if "low" in figure else f"{figure['value']:.1f}"
        print(f"{name:{width}}  {value:>6}   {interval}   {figure['chance']:.4f}")


def write_scalars(run: Path, figures: Mapping[str, Figure], curves: Curves, split: str, epoch: int) -> None:
    """The figures as TensorBoard scalars at the best epoch; those of an earlier evaluation are removed.

    A curve has its recall in per cent, or its scope, in place of the step.
    """
    suffix = ".evaluation"
    for old in run.glob(f"events.out.tfevents.*{suffix}"):
        old.unlink()
    with SummaryWriter(str(run), filename_suffix=suffix) as board:
        for name, figure in figures.items():
            board.add_scalar(f"{split}/{name}", figure["value"], epoch)
        for name, points in curves.items():
            for place, precision in points.items():
                board.add_scalar(f"{split}_{name}", precision, place)
