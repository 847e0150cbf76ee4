"""Reads the figures of an evaluated run."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metrics import bootstrap_interval
from pipeline.errors import UserError
from pipeline.files import fingerprint, read_json


def read_figures(run: Path) -> dict[str, dict[str, float]]:
    """A run's figures; raises UserError where it is not evaluated, or was trained anew since."""
    if not (run / "metrics.json").is_file():
        raise UserError(f"{run} has no metrics.json; run evaluate.py --run {run} first")
    stamp, checkpoint = run / "evaluate.json", run / "best.pt"
    measured = read_json(stamp)["checkpoint"] if stamp.is_file() else None
    if not checkpoint.is_file() or measured != fingerprint(checkpoint):
        raise UserError(f"{run / 'metrics.json'} is not of the best.pt there; run evaluate.py --run {run} again")
    figures = read_json(run / "metrics.json")
    if not isinstance(figures, dict) or not isinstance(figures.get("figures"), dict):
        raise UserError(f"{run / 'metrics.json'} is broken; remove it and run evaluate.py --run {run} again")
    return figures["figures"]


def read_queries(run: Path) -> pa.Table:
    """What each pair scored in a run; raises UserError where that is missing or broken."""
    try:
        return pq.read_table(run / "queries.parquet")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {run / 'queries.parquet'} ({error}); run evaluate.py --run {run} again") from None


def difference(baseline: pa.Table, other: pa.Table, name: str) -> str:
    """Mean difference of a figure over the same pairs with its 95 % interval; empty where it is not one of pairs."""
    if name not in baseline.column_names:
        return ""
    differences = other[name].to_numpy() - baseline[name].to_numpy()
    low, high = bootstrap_interval(differences, baseline["image_id"].to_numpy())
    return f"{np.mean(differences):+.4f} [{low:+.4f} {high:+.4f}]"
