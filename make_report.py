"""Write one HTML file about a trained run, or about two side by side. It opens anywhere, without a network.

    python make_report.py --runs work/openclipart/runs/NAME
    python make_report.py --config configs/web_news.yaml --runs METHOD BASELINE --words drugs wall immigration

The report shows what test pairs and single words find, distances of Doc2Vec neighbors in the joint space, the figures
of evaluate.py, a map of the joint space, training curves, and how the runs were made. A run is a folder or, with
--config, the name of a run in that WORK. The first run's seed draws everything that is drawn.
"""

import argparse
import os
from pathlib import Path

from pipeline.command_line import Parser, run_script
from pipeline.errors import UserError
from pipeline.work import Work


def main(argv: list[str] | None = None) -> Path:
    """Write the report; returns its path."""
    arguments = parse_arguments(argv)
    folders = [find_run(name, arguments.config) for name in arguments.runs]

    from pipeline.files import write_text
    from reporting.compared_runs import ComparedRuns
    from reporting.page import render_report
    from reporting.sections import Options
    from training.encoder import RunEncoder
    from training.runs import work_of

    name = "-and-".join(os.path.basename(os.path.abspath(run)) for run in folders)[:200]
    out = arguments.out or Work(work_of(folders[0])).reports / f"{name}.html"
    runs = ComparedRuns([RunEncoder(folder, arguments.device) for folder in folders])
    options = Options(arguments.queries, arguments.words, arguments.count, arguments.top)
    write_text(out, render_report(runs, options))
    queries = len(runs.positions_of(options.queries, options.count))
    print(f"{queries} queries, {len(options.words)} words; {out.stat().st_size / 1e6:.1f} MB, whole in one file")
    print(f"wrote {out}")
    return out


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError for values out of range."""
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, help="YAML file whose WORK holds the runs that are given by name")
    parser.add_argument(
        "--runs", nargs="+", required=True, help="one or two finished runs, the method before the baseline"
    )
    parser.add_argument("--queries", nargs="+", type=int, help="pair numbers to search by (default: drawn by seed)")
    parser.add_argument("--words", nargs="+", default=[], help="single words to search by")
    parser.add_argument("--count", type=int, default=6, help="queries that are drawn without --queries (default: 6)")
    parser.add_argument("--top", type=int, default=3, help="results of a query (default: 3)")
    parser.add_argument("--out", type=Path, help="the file to write (default: WORK/reports/RUNS.html)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    arguments = parser.parse_args(argv)
    if len(arguments.runs) > 2:
        raise UserError(f"--runs takes one run or two, not {len(arguments.runs)}")
    if arguments.top < 1 or arguments.count < 1:
        raise UserError("--top and --count must be at least 1")
    if arguments.out and arguments.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {arguments.out} must end in .html")
    return arguments


def find_run(name: str, config: Path | None) -> Path:
    """The folder of a run given as a folder or, with a config file, by name."""
    if (Path(name) / "config.yaml").is_file() or config is None:
        return Path(name)
    from pipeline.settings import load_settings

    return load_settings(config).work_folder / "runs" / name


if __name__ == "__main__":
    run_script(main)
