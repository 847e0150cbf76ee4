"""One table of several evaluated runs, and each one's difference from the first.

    python compare_runs.py work/openclipart/runs/l_i2t_l_sym_1_l_img_0_l_text_0-seed=0 \\
        work/openclipart/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0

Reads each run's metrics.json and queries.parquet (evaluate.py). A difference is over the same test pairs, with a 95 %
bootstrap interval over their images: over pairs, that is, not over trainings. Over seeds: reproduce_tables.py.
"""

import argparse
from pathlib import Path

from pipeline.command_line import run_script
from pipeline.errors import UserError
from pipeline.files import read_json
from reporting.figures import difference, read_figures, read_queries


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of evaluated runs, the baseline first")
    runs: list[Path] = parser.parse_args(argv).runs
    figures = [read_figures(run) for run in runs]
    queries = [read_queries(run) for run in runs]
    datasets = [read_json(run / "inputs.json").get("pairs.parquet") for run in runs]
    for run, dataset, table in zip(runs, datasets, queries, strict=True):
        if dataset != datasets[0]:
            raise UserError(
                f"{run} and {runs[0]} were trained on different pairs.parquet, so that no figure is over the same pairs"
            )
        if not table["pair"].equals(queries[0]["pair"]):
            raise UserError(f"{run} was evaluated on other pairs than {runs[0]}; evaluate both on the same split")

    for number, run in enumerate(runs):
        print(f"[{number}] {run.name}")
    header = "".join(f"{f'[{number}]':>9}" for number in range(len(runs)))
    header += "".join(f"{f'[{number}] - [0]':>26}" for number in range(1, len(runs)))
    names = [name for name in figures[0] if all(name in other for other in figures)]
    width = max(map(len, names))
    print(f"{'':{width}}{header}{'chance':>10}")
    for name in names:
        cells = [f"{run_figures[name]['value']:9.4f}" for run_figures in figures]
        cells += [f"{difference(queries[0], other, name):>26}" for other in queries[1:]]
        print(f"{name:{width}}{''.join(cells)}{figures[0][name]['chance']:10.4f}")


if __name__ == "__main__":
    run_script(main)
