"""One HTML file about a trained run, or about two side by side, that opens anywhere, without a network.

    python make_report.py --runs work/openclipart/runs/NAME
    python make_report.py --config configs/web_news.yaml --runs METHOD BASELINE --words drugs wall immigration

What test pairs and single words find, how far apart neighbors are that Doc2Vec names, training curves, the figures of
evaluate.py, a map of the joint space, and how the runs were made. A run is a folder or, with --config, the name of one
in that WORK. Everything that is drawn is drawn by the first run's seed.
"""

import argparse
from pathlib import Path

from pipeline.command_line import run_script
from pipeline.errors import UserError
from pipeline.files import written_whole
from pipeline.settings import load_settings
from reporting.report import (
    Compared,
    figures,
    how_made,
    maps,
    proximity,
    render,
    retrieval,
    retrieval_by_word,
    training_curves,
)
from training.encoder import RunEncoder


def main(argv: list[str] | None = None) -> Path:
    """Write the report; returns its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file whose WORK has the runs that are given by name")
    parser.add_argument(
        "--runs", nargs="+", required=True, help="one or two finished runs, the method before the baseline"
    )
    parser.add_argument("--queries", nargs="+", type=int, help="pair numbers to search by (default: drawn by seed)")
    parser.add_argument("--words", nargs="+", default=[], help="single words to search by")
    parser.add_argument("--count", type=int, default=6, help="queries that are drawn without --queries (default: 6)")
    parser.add_argument("--top", type=int, default=5, help="results of a query (default: 5)")
    parser.add_argument("--out", type=Path, help="the file to write (default: WORK/reports/RUNS.html)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if any")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) > 2:
        raise UserError(f"--runs takes one run or two, not {len(arguments.runs)}")
    if arguments.top < 1 or arguments.count < 1:
        raise UserError("--top and --count must be at least 1")
    folders = [find_run(name, arguments.config) for name in arguments.runs]
    out = arguments.out or folders[0].parents[1] / "reports" / f"{'-and-'.join(run.name for run in folders)[:200]}.html"
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out} must end in .html")

    compared = Compared([RunEncoder(folder, arguments.device) for folder in folders])
    positions = compared.positions_of(arguments.queries, arguments.count)
    sections = {
        "retrieval": [retrieval(compared, position, arguments.top) for position in positions],
        "words": [retrieval_by_word(compared, word, arguments.top) for word in arguments.words],
        "proximity": proximity(compared),
        "curves": training_curves(compared),
        "figures": figures(compared),
        "maps": maps(compared),
        "made": how_made(compared),
    }
    page = render(compared, sections)
    with written_whole(out) as beside:
        beside.write_text(page, encoding="utf-8")
    print(
        f"{len(positions)} queries, {len(arguments.words)} words; {out.stat().st_size / 1e6:.1f} MB, whole in one file"
    )
    print(f"wrote {out}")
    return out


def find_run(name: str, config: Path | None) -> Path:
    """The folder of a run that is given as a folder or, with a config file, by name; raises UserError without one."""
    if (Path(name) / "config.yaml").is_file() or config is None:
        return Path(name)
    return load_settings(config).work_folder / "runs" / name


# Retrieval


# Proximity


# Training and figures


# The map


# How it was made


if __name__ == "__main__":
    run_script(main)
