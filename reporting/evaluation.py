"""What evaluate.py measures of embedded pairs, prints, and shows in TensorBoard."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

import metrics
from metrics import EmbeddedPairs, Metric, Scores
from pipeline.progress import ProgressBar
from pipeline.schema import Evaluation
from reporting.figures import Figure, bootstrap_interval
from reporting.precision_curves import Curves
from training.described_scalars import Board

MIN_IMAGES = 10
"""Images below which no figure is given: by chance alone a few queries are all right, or all wrong."""


def measure(pairs: EmbeddedPairs, evaluation: Evaluation, seed: int) -> tuple[dict[str, Figure], dict[str, Scores]]:
    """Every metric's value, 95 % interval and value by chance; and what each query scored.

    Metrics that are not defined on these pairs are left out, and all of them where there are fewer than MIN_IMAGES
    images; why is printed. seed: of the bootstrap.
    """
    images = len(np.unique(pairs.groups))
    if images < MIN_IMAGES:
        print(
            f"warning: the split has {images} images with a known word, and no figure means anything below "
            f"{MIN_IMAGES}: all are left out; prepare more pairs, or evaluate another split (--evaluation.split)"
        )
        return {}, {}
    figures: dict[str, Figure] = {}
    scores_of: dict[str, Scores] = {}
    left_out: list[str] = []
    asked_for = metrics.registered(evaluation).values()
    for asked in ProgressBar(asked_for, desc="measuring", unit="metric", leave=False):
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
        figure = {"value": metric.value(scores)}
        if isinstance(scores, Scores):
            groups = pairs.groups if scores.groups is None else scores.groups
            low, high = bootstrap_interval(
                scores.values, groups, resamples=evaluation.bootstrap, seed=seed, median=metric.is_median
            )
            figure |= {"low": low, "high": high}
            scores_of[metric.name] = scores
        figures[metric.name] = figure | {"chance": metric.chance(pairs)}
    for reason in dict.fromkeys(left_out):
        print(reason)
    return figures, scores_of


def print_table(figures: Mapping[str, Figure]) -> None:
    """The figures, a line each."""
    if not figures:
        return
    width = max(map(len, figures))
    print(f"{'':{width}}   value   95 % interval    chance")
    for name, figure in figures.items():
        interval = f"{figure['low']:.4f} {figure['high']:.4f}" if "low" in figure else " " * 13
        print(f"{name:{width}}  {figure['value']:6.4f}   {interval}   {figure['chance']:.4f}")


def write_scalars(
    run: Path, figures: Mapping[str, Figure], metrics: Iterable[Metric], curves: Curves, split: str, epoch: int
) -> None:
    """The figures as TensorBoard scalars at the best epoch; those of an earlier evaluation are removed.

    metrics: what the figures are of. A curve has its recall in per cent, or its scope, in place of the step.
    """
    suffix = ".evaluation"
    for old in run.glob(f"events.out.tfevents.*{suffix}"):
        old.unlink()
    with Board(run, metrics, split, filename_suffix=suffix) as board:
        for name, figure in figures.items():
            board.add_scalar(f"{split}/{name}", figure["value"], epoch)
        for name, points in curves.items():
            for place, precision in points.items():
                board.add_scalar(f"{split}_{name}", precision, place)
