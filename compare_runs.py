"""One table of several evaluated runs, and each one's difference from the first.

    python compare_runs.py work/openclipart/runs/l_i2t_l_sym_1_l_img_0_l_text_0-seed=0 \\
        work/openclipart/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0

Reads each run's metrics.json, queries.parquet and scores.parquet (evaluate.py). A difference is over the same test
pairs. Its 95 % bootstrap interval is over their images: it says nothing of other trainings. For intervals over seeds
see reproduce_tables.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command_line import Parser, run_script
from pipeline.errors import UserError
from pipeline.files import read_json

if TYPE_CHECKING:
    from reporting.figures import RunScores


def main(argv: list[str] | None = None) -> None:
    runs = parse_arguments(argv).runs

    from reporting.figures import RunScores, read_figures

    figures = [read_figures(run) for run in runs]
    scores = [RunScores(run) for run in runs]
    check_same_pairs(runs, scores)

    for number, run in enumerate(runs):
        print(f"[{number}] {run.name}")
    header = "".join(f"{f'[{number}]':>9}" for number in range(len(runs)))
    header += "".join(f"{f'[{number}] - [0]':>26}" for number in range(1, len(runs)))
    names = [name for name in figures[0] if all(name in other for other in figures)]
    if not names:
        raise UserError(f"the runs have no figure in common; run evaluate.py --run {runs[0]} again, on more pairs")
    width = max(map(len, names))
    print(f"{'':{width}}{header}{'chance':>10}")
    for name in names:
        cells = [f"{of_run[name]['value']:9.4f}" for of_run in figures]
        cells += [f"{other.difference(scores[0], name):>26}" for other in scores[1:]]
        print(f"{name:{width}}{''.join(cells)}{figures[0][name]['chance']:10.4f}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of evaluated runs, the baseline first")
    return parser.parse_args(argv)


def check_same_pairs(runs: Sequence[Path], scores: Sequence["RunScores"]) -> None:
    """Raise UserError where a run was trained on another dataset, or evaluated on other pairs, than the first."""
    datasets = [read_json(run / "inputs.json").get("pairs.parquet") for run in runs]
    for run, dataset, of_run in zip(runs, datasets, scores, strict=True):
        if dataset != datasets[0]:
            raise UserError(
                f"{run} and {runs[0]} were trained on different pairs.parquet, so no figure is over the same pairs; "
                "compare runs of one WORK"
            )
        if not of_run.has_same_pairs(scores[0]):
            raise UserError(f"{run} was evaluated on other pairs than {runs[0]}; evaluate both on the same split")


if __name__ == "__main__":
    run_script(main)
