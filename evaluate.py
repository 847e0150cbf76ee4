"""Step 5: measure a trained model on the test pairs.

    python evaluate.py --run work/openclipart/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0

Reads the run's best.pt and config.yaml, the pairs of the test split and their Doc2Vec vectors. Flags may change what is
measured (--evaluation.kway [5,20]), training.device and training.workers; all else is the run's. Prints one table and
writes to the run's folder:

- metrics.json: every metric with its 95 % interval and its value by chance;
- queries.parquet: what each pair scored, and scores.parquet: what each query scored where these are other than the
  pairs, for paired comparisons of runs;
- TensorBoard: the metrics, precision over recall and over scope where there are categories, and embeddings of some
  pairs for its projector.

With --name NAME the three files go to the run's evaluations/NAME. Those of the run stay, and TensorBoard's pages too.
"""

import sys
from pathlib import Path

import numpy as np

from pipeline.command_line import make_parser, mistakes_in_name, parse_settings, path_of, peek, run_script, say_next
from pipeline.errors import UserError
from pipeline.files import fingerprint, is_whole, read_array, read_json, write_json, write_stamp
from pipeline.schema import EVALUATION, Settings
from pipeline.settings import flatten, names_shaping, select
from pipeline.work import EVALUATIONS, Work

SHAPING = names_shaping(EVALUATION)
"""Settings that shape what is written."""

FREE = ("evaluation.", "training.device", "training.workers")
"""Settings that may differ from those the run was trained with."""


def main(argv: list[str] | None = None) -> None:
    run, folder, settings = run_and_settings(sys.argv[1:] if argv is None else argv)

    from metrics import EmbeddedPairs
    from pipeline.devices import choose_device, use_precision
    from pipeline.pairs import load_images
    from reporting.evaluation import measure, print_table, write_scalars
    from reporting.figures import QUERIES, SCORES, measured_metrics, write_scores
    from reporting.precision_curves import precision_curves
    from training import tensorboard_pages
    from training.expansion import embed_split
    from training.image_sources import made_from
    from training.runs import load_model
    from training.text_streams import load_pairs

    split = settings.evaluation.split
    stamp, outputs = folder / "evaluate.json", [folder / name for name in ("metrics.json", QUERIES, SCORES)]
    shaping = {
        "settings": select(settings, SHAPING),
        "checkpoint": fingerprint(run / "best.pt"),
        "images": made_from(settings.model.image, settings.seed, load_images(settings.work_folder)),
    }
    if is_whole(stamp, shaping, outputs):
        print_table(read_json(outputs[0])["figures"])
        say_done(run, "up to date", outputs)
        return
    stamp.unlink(missing_ok=True)

    device = choose_device(settings.training.device)
    use_precision(settings.training.precision)
    data = load_pairs(settings.work_folder, settings.features_folder, settings.model.text, device)
    model = load_model(run, settings.model, settings.seed, device)
    rows = data.rows[split]
    x, y = embed_split(model, data, settings, device)
    reference = np.array(read_array(Work(settings.work_folder).vectors)[rows])
    groups, unused = data.image_ids[rows], data.unused[split]
    pairs = EmbeddedPairs(x, y, groups, data.categories[rows], reference, settings.evaluation.preservation_k)
    figures, scores = measure(pairs, settings.evaluation, settings.seed)

    images = len(np.unique(groups))
    print(f"{len(rows):,} {split} pairs of {images:,} images, {unused:,} pairs without a known word left out")
    print_table(figures)
    epoch = read_json(run / "run.json")["best_epoch"]
    write_scores(folder, rows, groups, scores)
    of_split = {"split": split, "pairs": len(rows), "pairs_without_known_word": unused, "epoch": epoch}
    if settings.evaluation.expand:
        of_split |= {name: getattr(settings.evaluation, name) for name in ("expand", "expand_neighbors")}
    write_json(outputs[0], {**of_split, "figures": figures})
    measured = measured_metrics(settings.evaluation, figures).values()
    if folder == run:
        write_scalars(run, figures, measured, precision_curves(pairs), split, epoch)
        tensorboard_pages.write_projector(run, data, rows, x, y, settings, epoch)
    write_stamp(stamp, shaping, outputs)
    say_done(run, "wrote", outputs)


def run_and_settings(argv: list[str]) -> tuple[Path, Path, Settings]:
    """The run's folder, that of the evaluation, and the run's settings with the flags' changes.

    Raises UserError where the run is not finished, or a flag changes a setting that the run was trained with.
    """
    parser = make_parser(__doc__)
    parser.add_argument("--run", required=True, help="folder of a finished run, WORK/runs/NAME")
    parser.add_argument(
        "--force", action="store_true", help="evaluate although images or neighbors have changed since training"
    )
    parser.add_argument("--name", help="name of the evaluation's folder in RUN/evaluations (default: RUN itself)")
    given = peek(argv, "--run")
    run = path_of((given or [""])[-1])
    trained = None
    if given:
        from training.runs import finished_run

        trained = finished_run(run, force="--force" in argv)[0]
    settings, _, arguments = parse_settings(parser, argv, base=trained, also=mistakes_in_name)
    if trained is None:  # --run was given without a value: else the parser has asked for it
        raise UserError("--run names no folder; give it that of a finished run, WORK/runs/NAME")
    before = flatten(trained)
    for name, value in flatten(settings).items():
        if value != before[name] and not name.startswith(FREE):
            raise UserError(
                f"{name} is {value}, and {run} was trained with {before[name]}; leave it out (evaluate.py takes "
                "--evaluation.*, --training.device and --training.workers), or train another run with it"
            )
    return run, run / EVALUATIONS / arguments.name if arguments.name else run, settings


def say_done(run: Path, done: str, outputs: list[Path]) -> None:
    """The last lines: every output, and what an evaluated run is good for."""
    for path in outputs:
        print(f"{done} {path}")
    say_next("python", "search.py", "--run", run, "--serve")
    say_next("tensorboard", "--logdir", run.parent)


if __name__ == "__main__":
    run_script(main)
