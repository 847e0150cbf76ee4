"""Figures of evaluated runs: their intervals, their files, and the difference of two runs.

A figure is one metric's number of one run with what stands beside it: `value`, `low` and `high` (its 95 % interval,
where it has one) and `chance`.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metrics import Metric, registered
from pipeline.errors import UserError
from pipeline.files import fingerprint, read_json
from pipeline.schema import Evaluation
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
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, (low, high).

    Whole groups are drawn, with all of their values (a cluster bootstrap): the captions of one image are not
    independent. values: (n,). groups: (n,); None: all differ. Raises ValueError for other shapes, no values, values
    that are not finite, resamples < 1 and a confidence outside (0, 1).
    """
    values = as_array(values).astype(np.float64)
    groups = group_codes(groups, len(values))
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be (n,), n > 0, and finite, got shape {values.shape}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    _check_confidence(confidence)
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
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


# --- Files of a run --------------------------------------------------------------------------------------------------


def read_figures(run: Path) -> dict[str, Figure]:
    """A run's figures by metric name. Raises UserError where it is not evaluated, or was trained again since."""
    if not (run / "metrics.json").is_file():
        raise UserError(f"{run} has no metrics.json; run evaluate.py --run {run} first")
    checkpoint = run / "best.pt"
    if not checkpoint.is_file() or _stamp(run).get("checkpoint") != fingerprint(checkpoint):
        raise UserError(f"{run / 'metrics.json'} is not of the best.pt there; run evaluate.py --run {run} again")
    figures = read_json(run / "metrics.json")
    if not isinstance(figures, dict) or not isinstance(figures.get("figures"), dict):
        raise UserError(f"{run / 'metrics.json'} is broken; remove it and run evaluate.py --run {run} again")
    return figures["figures"]


def read_metrics(run: Path) -> dict[str, Metric]:
    """The metrics that an evaluated run was asked for, by name: titles and directions of its figures."""
    settings = {name.removeprefix("evaluation."): value for name, value in _stamp(run).get("settings", {}).items()}
    evaluation = Evaluation(**{name: settings[name] for name in vars(Evaluation()) if name in settings})
    # A gallery smaller than an asked-for k is measured with another k.
    names = read_json(run / "metrics.json")["figures"] if (run / "metrics.json").is_file() else {}
    measured = [int(found[1]) for name in names if (found := re.match(r"(\d+)way_", name))]
    evaluation.kway = list(dict.fromkeys([*evaluation.kway, *measured]))
    return registered(evaluation)


def _stamp(run: Path) -> dict[str, Any]:
    """What evaluate.py noted of its inputs; empty where it has not."""
    path = run / "evaluate.json"
    stamp = read_json(path) if path.is_file() else {}
    return stamp if isinstance(stamp, dict) else {}


def read_queries(run: Path) -> pa.Table:
    """What each pair scored in a run; raises UserError where that is missing or broken."""
    try:
        return pq.read_table(run / "queries.parquet")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {run / 'queries.parquet'} ({error}); run evaluate.py --run {run} again") from None


def difference(baseline: pa.Table, other: pa.Table, name: str) -> str:
    """Mean difference of a metric over the same pairs with its 95 % interval; empty where pairs have no scores."""
    if name not in baseline.column_names:
        return ""
    differences = other[name].to_numpy() - baseline[name].to_numpy()
    low, high = bootstrap_interval(differences, baseline["image_id"].to_numpy())
    return f"{np.mean(differences):+.4f} [{low:+.4f} {high:+.4f}]"
