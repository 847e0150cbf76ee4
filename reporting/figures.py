"""Figures of evaluated runs: their intervals, their files, and the difference of two runs.

A figure is one metric's number of one run with what stands beside it: `value`, `low` and `high` (its 95 % interval,
where it has one) and `chance`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metrics import Metric, Scores, registered
from pipeline.errors import UserError
from pipeline.files import demand_undamaged, fingerprint, read_json, written_whole
from pipeline.schema import Evaluation
from pipeline.work import run_of
from ranking import Labels, Matrix, as_array, group_codes

Figure = dict[str, float]

# --- Intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: Matrix | Sequence[float],
    groups: Labels | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    median: bool = False,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, or of their median rounded down: (low, high).

    Whole groups are drawn, with all of their values (a cluster bootstrap): the captions of one image are not
    independent. values: (n,). groups: (n,); None: all differ. Raises ValueError for other shapes, no values, values
    that are not finite, resamples < 1 and a confidence outside (0, 1).
    """
    values = as_array(values).astype(np.float64)
    codes = group_codes(groups, len(values))
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be (n,), n > 0, and finite, got shape {values.shape}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    _check_confidence(confidence)
    return _interval(_resampled(values, codes, int(codes.max()) + 1, resamples, seed, median), confidence)


def difference_interval(
    ours: tuple[np.ndarray, np.ndarray],
    baseline: tuple[np.ndarray, np.ndarray],
    *,
    resamples: int = 1000,
    seed: int = 0,
    median: bool = False,
) -> tuple[float, float]:
    """95 % interval of the mean (or median) of `ours` less that of `baseline`: both take the same drawn groups.

    ours, baseline: values (n,) and their groups (n,). The queries may differ. The groups are the same.
    """
    _, codes = np.unique(np.concatenate([ours[1], baseline[1]]), return_inverse=True)
    sides = zip((ours[0], baseline[0]), np.split(codes, [len(ours[1])]), strict=True)
    first, second = (_resampled(values, own, int(codes.max()) + 1, resamples, seed, median) for values, own in sides)
    return _interval(first - second, 0.95)


def _resampled(
    values: np.ndarray, codes: np.ndarray, groups: int, resamples: int, seed: int, median: bool
) -> np.ndarray:
    """Mean, or median rounded down, of `values` (n,) in every resample of the groups numbered `codes` (n,)."""
    rng = np.random.default_rng(seed)
    statistic = statistic_of_draws(values, codes, groups, median)
    return np.array([statistic(rng.integers(groups, size=groups)) for _ in range(resamples)])


def statistic_of_draws(
    values: np.ndarray, codes: np.ndarray, groups: int, median: bool
) -> Callable[[np.ndarray], float]:
    """A function from drawn groups to the mean, or the median rounded down, of the `values` (n,) of these groups.

    codes: (n,) the group of each value, below `groups`. A group may be drawn several times.
    """
    sums, counts = np.bincount(codes, values, groups), np.bincount(codes, minlength=groups)
    order = np.argsort(values, kind="stable")

    def mean_of(drawn: np.ndarray) -> float:
        return float(sums[drawn].sum() / counts[drawn].sum())

    def median_of(drawn: np.ndarray) -> float:
        upto = np.cumsum(np.bincount(drawn, minlength=groups)[codes[order]])
        middle = np.searchsorted(upto, [(upto[-1] - 1) // 2, upto[-1] // 2], side="right")
        return float(np.floor(values[order[middle]].mean()))

    return median_of if median else mean_of


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_t_interval(differences: Sequence[float] | Matrix, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences, one a seed, with its Student t interval, (mean, low, high).

    differences: (n,). Raises ValueError for other shapes, n < 2, values that are not finite and a confidence outside
    (0, 1).
    """
    differences = as_array(differences).astype(np.float64)
    if differences.ndim != 1 or len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError(f"differences must be (n,), n > 1, and finite, got shape {differences.shape}")
    _check_confidence(confidence)
    from scipy.stats import t  # late: it takes half a second, and only the tables need it

    n = len(differences)
    mean = float(differences.mean())
    half_width = float(t.ppf((1 + confidence) / 2, n - 1)) * float(differences.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half_width, mean + half_width


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")


QUERIES, SCORES = "queries.parquet", "scores.parquet"

# --- Files of a run --------------------------------------------------------------------------------------------------


def read_figures(run: Path) -> dict[str, Figure]:
    """A run's figures by metric name, or those in the folder of a named evaluation.

    Raises UserError where it is not evaluated, or was trained again since.
    """
    if not (run / "metrics.json").is_file():
        raise UserError(f"{run} has no metrics.json; run evaluate.py --run {run} first")
    checkpoint = run_of(run) / "best.pt"
    if not checkpoint.is_file() or _stamp(run).get("checkpoint") != fingerprint(checkpoint):
        raise UserError(f"{run / 'metrics.json'} is not of the best.pt there; run evaluate.py --run {run} again")
    demand_undamaged(run / "metrics.json")
    figures = read_json(run / "metrics.json")
    if not isinstance(figures, dict) or not isinstance(figures.get("figures"), dict):
        raise UserError(f"{run / 'metrics.json'} is broken; remove it and run evaluate.py --run {run} again")
    return figures["figures"]


def read_metrics(run: Path) -> dict[str, Metric]:
    """The metrics that an evaluated run was asked for, by name: titles and directions of its figures."""
    settings = {name.removeprefix("evaluation."): value for name, value in _stamp(run).get("settings", {}).items()}
    evaluation = Evaluation(**{name: settings[name] for name in vars(Evaluation()) if name in settings})
    names = read_json(run / "metrics.json")["figures"] if (run / "metrics.json").is_file() else {}
    return measured_metrics(evaluation, names)


def measured_metrics(evaluation: Evaluation, names: Iterable[str]) -> dict[str, Metric]:
    """The metrics asked for, by name, and those of `names`: a gallery below a k is measured with a smaller one."""
    measured = [int(found[1]) for name in names if (found := re.match(r"(\d+)way_", name))]
    kway = list(dict.fromkeys([*evaluation.kway, *measured]))
    return registered(evaluation.model_copy(update={"kway": kway}))


def _stamp(run: Path) -> dict[str, Any]:
    """What evaluate.py noted of its inputs; empty where it has not."""
    path = run / "evaluate.json"
    stamp = read_json(path) if path.is_file() else {}
    return stamp if isinstance(stamp, dict) else {}


def write_scores(run: Path, rows: np.ndarray, groups: np.ndarray, scores: Mapping[str, Scores]) -> None:
    """Write what each query scored: queries.parquet where the pairs are the queries, else scores.parquet.

    rows, groups: (R,) pair numbers and image numbers.
    """
    of_pairs = {name: of_metric.values for name, of_metric in scores.items() if of_metric.groups is None}
    others = {name: of_metric for name, of_metric in scores.items() if of_metric.groups is not None}
    tables = {
        QUERIES: pa.table({"pair": rows, "image_id": groups, **of_pairs}),
        SCORES: pa.table(
            {
                "metric": pa.array((name for name, of in others.items() for _ in of.values), pa.string()),
                "image_id": np.concatenate([np.empty(0, np.int64), *(of.groups for of in others.values())]),
                "score": np.concatenate([np.empty(0), *(of.values for of in others.values())]),
            }
        ),
    }
    for name, table in tables.items():
        with written_whole(run / name) as temporary_path:
            pq.write_table(table, temporary_path)


class RunScores:
    """What the queries of an evaluated run scored. Raises UserError where that is missing or broken."""

    def __init__(self, run: Path) -> None:
        for name in (QUERIES, SCORES):
            demand_undamaged(run / name)
        try:
            self.of_pairs, others = (pq.read_table(run / name) for name in (QUERIES, SCORES))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read the scores of {run} ({error}); run evaluate.py --run {run} again") from None
        self.metrics = read_metrics(run)
        images = self.of_pairs["image_id"].to_numpy()
        self.of_metric = {
            name: (self.of_pairs[name].to_numpy(), images)
            for name in self.of_pairs.column_names
            if name not in ("pair", "image_id")
        }
        """What the queries scored (q,), and their image numbers (q,), by metric name."""
        names, images, values = (others[column].to_numpy() for column in ("metric", "image_id", "score"))
        self.of_metric |= {name: (values[names == name], images[names == name]) for name in dict.fromkeys(names)}

    def has_same_pairs(self, other: "RunScores") -> bool:
        """Whether both runs were evaluated on the same pairs."""
        return self.of_pairs["pair"].equals(other.of_pairs["pair"])

    def difference(self, baseline: "RunScores", name: str) -> str:
        """Difference of a metric from that of `baseline`, with its paired 95 % interval over images; or empty."""
        if name not in self.of_metric or name not in baseline.of_metric:
            return ""
        median = name in self.metrics and self.metrics[name].is_median
        ours, theirs = self.of_metric[name], baseline.of_metric[name]
        low, high = difference_interval(ours, theirs, median=median)
        value = np.subtract(*(np.floor(np.median(of)) if median else of.mean() for of in (ours[0], theirs[0])))
        return f"{value:+.4f} [{low:+.4f} {high:+.4f}]"
