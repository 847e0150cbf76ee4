"""Step 5: measure a trained model on the test pairs.

    python evaluate.py --run work/openclipart/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0

Reads the run's best.pt and config.yaml, the pairs of the test split and their Doc2Vec vectors. What is measured can be
changed with flags such as --evaluation.kway [5,20], and so can training.device and training.workers; everything else
is the run's. Prints one table and writes it to the run's folder: metrics.json, queries.parquet (what each pair scored,
for paired comparisons of runs) and TensorBoard scalars, with curves of precision over recall and over scope where there
are categories, and a sample of the embeddings for its projector.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import metrics
from datasets import Prepared, load_prepared
from pipeline.command_line import make_parser, parse_settings, peek, run_script, say_next
from pipeline.errors import UserError
from pipeline.files import fingerprint, read_array, read_json, write_json, written_whole
from pipeline.pairs import load_images
from pipeline.schema import EVALUATION
from pipeline.settings import Settings, flatten, names_shaping, select
from training import boards
from training.embedding import embed_split, made_from
from training.runs import choose_device, finished_run, load_model

SHAPING = names_shaping(EVALUATION)

FREE = ("evaluation.", "training.device", "training.workers")
"""Settings that may differ from those the run was trained with."""

Figures = dict[str, dict[str, float]]
Curves = dict[str, dict[int, float]]

SCOPES = [digit * 10**power for power in range(8) for digit in (1, 2, 3, 5, 7)]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--run", required=True, help="folder of a finished run, WORK/runs/NAME")
    parser.add_argument(
        "--force", action="store_true", help="evaluate although image files or neighbors are others than in training"
    )
    argv = sys.argv[1:] if argv is None else argv
    given = peek(argv, "--run")
    run = Path((given or [""])[-1])
    trained = finished_run(run, force="--force" in argv)[0] if given else None
    settings, _, _ = parse_settings(parser, argv, base=trained)
    if trained is None:  # the parser has asked for the flag, and here it is empty
        raise UserError("--run names no folder; give it that of a finished run, WORK/runs/NAME")
    demand_settings_of_the_run(run, trained, settings)

    shaping = {
        "settings": select(settings, SHAPING),
        "checkpoint": fingerprint(run / "best.pt"),
        "images": made_from(settings, load_images(settings.work_folder)),
    }
    stamp, outputs = run / "evaluate.json", [run / "metrics.json", run / "queries.parquet"]
    if stamp.exists() and read_json(stamp) == shaping and all(path.exists() for path in outputs):
        print_table(read_json(outputs[0])["figures"])
        for path in outputs:
            print(f"up to date {path}")
        say_what_next(run)
        return
    stamp.unlink(missing_ok=True)

    device = choose_device(settings)
    data = load_prepared(settings)
    model = load_model(run, settings, device)
    rows = data.rows[settings.evaluation.split]
    x, y = embed_split(model, data, settings, device)
    reference = np.array(read_array(settings.work_folder / "doc2vec" / "vectors.npy")[rows])
    figures, queries = measure(x, y, reference, data, rows, settings)
    curves = precision_curves(x, y, data, rows)

    print(
        f"{len(rows):,} {settings.evaluation.split} pairs of {len(np.unique(data.image_ids[rows])):,} images, "
        f"{data.unused[settings.evaluation.split]:,} pairs without a known word left out"
    )
    print_table(figures)
    best_epoch = read_json(run / "run.json")["best_epoch"]
    with written_whole(outputs[1]) as beside:
        pq.write_table(queries, beside)
    write_json(
        outputs[0],
        {
            "split": settings.evaluation.split,
            "pairs": len(rows),
            "pairs_without_known_word": data.unused[settings.evaluation.split],
            "epoch": best_epoch,
            "figures": figures,
        },
    )
    write_scalars(run, figures, curves, settings.evaluation.split, best_epoch)
    boards.write_projector(run, data, rows, x, y, settings, best_epoch)
    write_json(stamp, shaping)
    for path in outputs:
        print(f"wrote {path}")
    say_what_next(run)


def say_what_next(run: Path) -> None:
    """What an evaluated run is good for."""
    say_next("python", "search.py", "--run", run, "--serve")
    say_next("tensorboard", "--logdir", run.parent)


def demand_settings_of_the_run(run: Path, trained: Settings, settings: Settings) -> None:
    """Raise UserError where a flag changes what the run was trained with, and with it what is evaluated."""
    before = flatten(trained)
    for name, value in flatten(settings).items():
        if value != before[name] and not name.startswith(FREE):
            raise UserError(
                f"{name} is {value}, and {run} was trained with {before[name]}; leave it out (evaluate.py takes "
                "--evaluation.*, --training.device and --training.workers), or train another run with it"
            )


def measure(
    x: torch.Tensor, y: torch.Tensor, reference: np.ndarray, data: Prepared, rows: np.ndarray, settings: Settings
) -> tuple[Figures, pa.Table]:
    """Every figure with its 95 % interval and its value by chance, and what each pair scored.

    x, y: (R, D) embeddings of the pairs `rows`' images and texts; reference: (R, d) their Doc2Vec vectors.
    """
    evaluation = settings.evaluation
    groups = data.image_ids[rows]
    ways = {"image_to_text": (x, y), "text_to_image": (y, x)}
    figures: Figures = {}
    columns: dict[str, np.ndarray] = {"pair": rows, "image_id": groups}

    def add(name: str, values: np.ndarray, chance: float, value_groups: np.ndarray = groups) -> None:
        low, high = metrics.bootstrap_interval(values, value_groups, resamples=evaluation.bootstrap, seed=settings.seed)
        figures[name] = {"value": float(np.mean(values)), "low": low, "high": high, "chance": chance}
        if value_groups is groups:
            columns[name] = values

    parts = len(ways) * (2 + len(evaluation.kway)) + 1
    progress = tqdm(total=parts, desc="measuring", unit="part", leave=False, disable=None)
    ranks = {}
    for way, (queries, targets) in ways.items():
        ranks[way] = metrics.rank_pairs(queries, targets, groups)
        progress.update()
    for k in evaluation.kway:
        for way, (queries, targets) in ways.items():
            name = f"{k}way_recall_at_1_{way}"
            add(name, ranks[way].kway_success_probabilities(k), ranks[way].kway_chance(k))
            if evaluation.sampled_repeats:
                figures[name]["sampled"] = metrics.sampled_kway_recall_at_1(
                    queries, targets, k, groups, repeats=evaluation.sampled_repeats, seed=settings.seed
                )
            progress.update()

    for way in ways:
        best, best_groups = ranks[way].best, ranks[way].best_groups
        for k in evaluation.recall_at:
            add(f"recall_at_{k}_{way}", (best <= k).astype(float), ranks[way].recall_chance(k), best_groups)
        median = float(np.floor(np.median(best)))  # rounded down, as VSE++ does
        figures[f"median_rank_{way}"] = {"value": median, "chance": ranks[way].median_rank_chance()}

    neighbors = {str(evaluation.preservation_k): evaluation.preservation_k, "1_percent": max(round(len(rows) / 100), 1)}
    for label in [label for label, k in neighbors.items() if k >= metrics.neighbor_candidates(groups).min()]:
        print(f"neighborhood preservation of {neighbors.pop(label)} neighbors is left out: there are {len(rows)} pairs")
    shares = metrics.all_preserved_shares([x, y], reference, list(neighbors.values()), groups) if neighbors else ()
    for modality, of_modality in zip(("images", "texts"), shares, strict=False):
        for (label, k), values in zip(neighbors.items(), of_modality, strict=True):
            add(f"preservation_{label}_{modality}", values, metrics.preservation_chance(len(rows), k, groups))
    progress.update()

    for way, queries, targets, query_labels, target_labels, query_groups in by_category(x, y, data, rows):
        precisions = metrics.average_precisions(queries, targets, query_labels, target_labels)
        judged = ~np.isnan(precisions)
        chance = float(metrics.average_precision_chances(query_labels[judged], target_labels).mean())
        add(f"map_{way}", precisions[judged], chance, query_groups[judged])
        progress.update()
    progress.close()
    return figures, pa.table(columns)


def by_category(
    x: torch.Tensor, y: torch.Tensor, data: Prepared, rows: np.ndarray
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, np.ndarray, np.ndarray, np.ndarray]]:
    """Retrieval by category both ways: its name, queries, targets, the labels of both, and the queries' images.

    x, y: (R, D), as for `measure`. Pairs without a category are left out; an image of several texts is one item.
    """
    groups, labels = data.image_ids[rows], data.categories[rows]
    texts = np.flatnonzero(labels >= 0)
    images = texts[np.unique(groups[texts], return_index=True)[1]]
    if len(texts):
        yield "image_to_text", x[images], y[texts], labels[images], labels[texts], groups[images]
        yield "text_to_image", y[texts], x[images], labels[texts], labels[images], groups[texts]


def precision_curves(x: torch.Tensor, y: torch.Tensor, data: Prepared, rows: np.ndarray) -> Curves:
    """Precision over recall, in per cent, and over scope, the number of closest targets that are looked at."""
    curves: Curves = {}
    for way, *retrieval, _ in by_category(x, y, data, rows):
        recalls = range(0, 101, 10)
        precisions = metrics.precision_recall_curve(*retrieval, levels=[recall / 100 for recall in recalls])
        curves[f"precision_recall/{way}"] = dict(zip(recalls, precisions.tolist(), strict=True))
        count = len(retrieval[1])
        scopes = sorted({scope for scope in SCOPES if scope < count} | {count})
        precisions = metrics.precision_scope_curve(*retrieval, scopes=scopes)
        curves[f"precision_scope/{way}"] = dict(zip(scopes, precisions.tolist(), strict=True))
    return curves


def print_table(figures: Figures) -> None:
    """The figures, a line each."""
    width = max(map(len, figures))
    print(f"{'':{width}}   value   95 % interval    chance")
    for name, figure in figures.items():
        interval = f"{figure['low']:.4f} {figure['high']:.4f}" if "low" in figure else " " * 13
        value = f"{figure['value']:.4f}" if "low" in figure else f"{figure['value']:.1f}"
        print(f"{name:{width}}  {value:>6}   {interval}   {figure['chance']:.4f}")


def write_scalars(run: Path, figures: Figures, curves: Curves, split: str, epoch: int) -> None:
    """The figures as TensorBoard scalars at the best epoch, in place of those of an earlier evaluation.

    Where others have the step, a curve has its recall in per cent or its scope.
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


if __name__ == "__main__":
    run_script(main)
