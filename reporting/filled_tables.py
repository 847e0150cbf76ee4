"""A table filled with figures: means, differences with what chance may have done to them, and its Markdown."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reporting.significance import above_chance, holm, paired_t_test, seeds_and_images
from reporting.tables import PAPER, Table

if TYPE_CHECKING:
    from metrics import Metric

LEVEL = 0.05
"""A difference is marked where its adjusted p-value is below this, and its interval leaves out 0."""
ARROWS = {"image_to_text": "I→T", "text_to_image": "T→I"}

Differences = dict[str, dict[str, Any] | None]
"""Of two methods, by metric name."""
Resampled = Mapping[str, Mapping[str, np.ndarray]]
"""By metric name and method: a metric's mean over seeds in every resample of seeds and images (resamples,)."""


def fill(
    table: Table,
    columns: Sequence["Metric"],
    values: Mapping[str, Mapping[str, Sequence[float]]],
    dataset: str,
    chance: Mapping[str, float],
    resampled: Resampled | None = None,
) -> dict[str, Any]:
    """A table's content: mean, standard deviation and difference to the baseline, of every row and column.

    A difference is None with one seed. It has

    - `low` and `high`, the paired 95 % t-interval over seeds,
    - `seeds_and_images`, its 95 % interval over both, where there is `resampled`,
    - `p` of the paired t-test over seeds, and `p_holm`, adjusted for all differences of the table in all its columns,
    - `above_chance`, its share of the room between chance and 1, for shares.

    values: by method and metric name, one number a seed; the same seeds in the same order for all methods of a group.
    Methods without values are left out. dataset: its name, for the paper's values. chance: by metric name.
    """

    def compared(one: str, other: str) -> Differences:
        return {
            metric.name: _difference(
                values[one][metric.name],
                values[other][metric.name],
                chance[metric.name],
                [resampled[metric.name][name] for name in (one, other)]
                if resampled and metric.name in resampled
                else None,
            )
            for metric in columns
        }

    rows = _rows(table, columns, values, PAPER.get(table.number, {}).get(dataset, {}), chance, compared)
    contrasts: list[dict[str, Any]] = [
        {"method": one.name, "against": other.name, "figures": compared(one.name, other.name)}
        for one, other in table.contrasts
        if one.name in values and other.name in values
    ]
    all_cells = [cell["difference"] for row in rows for cell in row["figures"].values()]
    all_cells += [cell for contrast in contrasts for cell in contrast["figures"].values()]
    return {
        "table": table.number,
        "title": table.title,
        "note": table.note,
        "columns": [metric.name for metric in columns],
        "titles": [short_title(metric) for metric in columns],
        "chance": dict(chance),
        "rows": rows,
        "contrasts": contrasts,
        "comparisons": _adjust([cell for cell in all_cells if cell]),
    }


def _rows(
    table: Table,
    columns: Sequence["Metric"],
    values: Mapping[str, Mapping[str, Sequence[float]]],
    paper: Mapping[str, tuple[float, float]],
    chance: Mapping[str, float],
    compared: Callable[[str, str], Differences],
) -> list[dict[str, Any]]:
    """The rows of the methods that have values, the best cells marked."""
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(table.groups):
        present = [method.name for method in group if method.name in values]
        for name in present:
            against = compared(name, present[0]) if name != present[0] else {}
            cells = {
                metric.name: _summary(values[name][metric.name], chance[metric.name])
                | {"difference": against.get(metric.name)}
                for metric in columns
            }
            rows.append({"method": name, "group": number, "figures": cells, "paper": paper.get(name)})
    for metric in columns:
        for number in range(len(table.groups)):
            _mark(rows, metric, "bold", [row for row in rows if row["group"] == number])
        _mark(rows, metric, "underline", [row for row in rows if row["method"] in table.underlined])
    return rows


def resampled_runs(columns: Sequence["Metric"], runs: Mapping[str, Sequence[Path]]) -> Resampled:
    """A hierarchical bootstrap of every column, over seeds and test images; none with one seed.

    runs: by method, the folders of its evaluations in the order of the seeds.
    """
    from reporting.figures import RunScores

    scores = {name: [RunScores(run) for run in of_seeds] for name, of_seeds in runs.items()}
    first, *others = next(iter(scores.values()))
    if not others:
        return {}
    tested = [of_run.of_pairs.select(["pair", "image_id"]) for of_run in (first, *others)]
    return {
        metric.name: seeds_and_images(
            {name: [of_run.of_metric[metric.name] for of_run in of_seeds] for name, of_seeds in scores.items()},
            same_images=all(of_seed.equals(tested[0]) for of_seed in tested),
            median=metric.is_median,
        )
        for metric in columns
        if all(metric.name in of_run.of_metric for of_seeds in scores.values() for of_run in of_seeds)
    }


def short_title(metric: "Metric") -> str:
    """A metric's title above a column: `5-way I→T`, `R@1 T→I`."""
    label = metric.label.replace("-way Recall@1", "-way").replace("Recall@", "R@")
    return f"{label} {ARROWS.get(metric.direction, metric.direction)}"


def _summary(values: Sequence[float], chance: float) -> dict[str, Any]:
    """A cell: one number a seed, their mean and deviation, and how far the mean is above chance."""
    of_seeds = np.asarray(values, dtype=float)
    mean = float(of_seeds.mean())
    return {
        "values": of_seeds.tolist(),
        "mean": mean,
        "sd": float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else None,
        "above_chance": above_chance(mean, chance),
    }


def _difference(
    values: Sequence[float], baseline: Sequence[float], chance: float, resampled: Sequence[np.ndarray] | None
) -> dict[str, Any] | None:
    """The difference of two methods in a column; None with one seed. resampled: of both (resamples,), if there are."""
    if len(values) < 2:
        return None
    from reporting.figures import paired_t_interval

    of_seeds = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    mean, low, high = paired_t_interval(of_seeds)
    both = None
    if resampled:
        ends = np.quantile(resampled[0] - resampled[1], (0.025, 0.975))
        both = {"low": float(ends[0]), "high": float(ends[1])}
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "seeds_and_images": both,
        "p": paired_t_test(of_seeds),
        "above_chance": mean / (1 - chance) if 0 <= chance < 1 else None,
    }


def _adjust(differences: Sequence[dict[str, Any]]) -> int:
    """Add to each difference its p-value adjusted for all of them; returns their number."""
    for found, adjusted in zip(differences, holm([found["p"] for found in differences]), strict=True):
        found["p_holm"] = adjusted
    return len(differences)


def _mark(rows: list[dict[str, Any]], metric: "Metric", mark: str, among: list[dict[str, Any]]) -> None:
    """Set `mark` on the best cell of a column among some rows, if there are several to choose from."""
    if len(among) > 1:
        best = max if metric.higher_is_better else min
        best(among, key=lambda row: row["figures"][metric.name]["mean"])["figures"][metric.name][mark] = True


def to_markdown(content: Mapping[str, Any], heading: str) -> str:
    """A filled table as Markdown: mean ± standard deviation; the differences stand below."""
    columns, rows = content["columns"], content["rows"]
    with_paper = any(row["paper"] for row in rows)
    header = ["", *content["titles"], *(["paper"] if with_paper else [])]
    lines = [f"### Table {content['table']}: {content['title']}", "", heading, ""]
    lines += [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    group = rows[0]["group"]
    for row in rows:
        if row["group"] != group:
            lines.append("|" + " |" * len(header))
            group = row["group"]
        cells = [_cell(row["figures"][column]) for column in columns]
        if with_paper:
            cells.append(" ".join(f"{value:.4f}" for value in row["paper"]) if row["paper"] else "")
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    by_chance = [f"{content['chance'][column]:.4f}" for column in columns]
    lines.append(f"| chance | {' | '.join([*by_chance, *([''] if with_paper else [])])} |")
    if content["note"]:
        lines += ["", content["note"]]
    return "\n".join([*lines, *_differences(content)]) + "\n"


def _differences(content: Mapping[str, Any]) -> list[str]:
    """The table of the differences to the baselines, and of the further comparisons, if there are any."""
    columns, rows = content["columns"], content["rows"]
    compared = [row for row in rows if any(row["figures"][column]["difference"] for column in columns)]
    if not compared:
        return []
    baselines = {row["group"]: row["method"] for row in reversed(rows)}
    lines = ["", explanation(content), ""]
    lines += [f"| | {' | '.join(content['titles'])} |", "| --- |" + " ---: |" * len(columns)]
    for row in compared:
        cells = [_interval(row["figures"][column]["difference"]) for column in columns]
        lines.append(f"| {row['method']} against {baselines[row['group']]} | {' | '.join(cells)} |")
    for contrast in content["contrasts"]:
        cells = [_interval(contrast["figures"][column]) for column in columns]
        lines.append(f"| {contrast['method']} against {contrast['against']} | {' | '.join(cells)} |")
    return lines


def _cell(figure: Mapping) -> str:
    text = f"{figure['mean']:.4f}"
    if figure.get("bold"):
        text = f"**{text}**"
    if figure.get("underline"):
        text = f"<u>{text}</u>"
    return text if figure["sd"] is None else f"{text} ± {figure['sd']:.4f}"


def explanation(content: Mapping[str, Any]) -> str:
    """What stands in the cells of the differences."""
    cells = [row["figures"][column]["difference"] for row in content["rows"] for column in content["columns"]]
    cells = [cell for cell in cells if cell]
    over = "seeds and test images (hierarchical bootstrap)"
    if not all(cell["seeds_and_images"] for cell in cells):
        over = "seeds (paired t)"
    text = (
        f"Differences, with 95 % intervals over {over}. \\* stands where the interval leaves out 0 and "
        f"p < {LEVEL:g} in the paired t-test over seeds, with Holm's correction for all differences of the table, "
        f"{content['comparisons']}."
    )
    if any(cell["above_chance"] is not None for cell in cells):
        text += " κ is the difference as a share of the room above chance, 1 − chance."
    return text


def _interval(difference: Mapping | None) -> str:
    """`+0.0147 [+0.0060, +0.0240]*, κ +0.018`."""
    if not difference:
        return ""
    ends = difference["seeds_and_images"] or difference
    mean, low, high = (_signed(value, 4) for value in (difference["mean"], ends["low"], ends["high"]))
    text = f"{mean} [{low}, {high}]"
    if difference["p_holm"] < LEVEL and not ends["low"] <= 0 <= ends["high"]:
        text += "\\*"
    kappa = difference["above_chance"]
    return text if kappa is None else f"{text}, κ {_signed(kappa, 3)}"


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # no -0.0000
