"""Train and measure every method of the paper's tables, and of ours, over several seeds, and write the tables.

    python reproduce_tables.py --config configs/web_news.yaml --seeds 5 --tables 1 3 4 --out results/web_news

A seed varies all that is random: the split where none is published, Doc2Vec, initialisation, batches. Methods of one
seed share steps 0 to 3; all seeds share the cached image features. Tables 1 to 4 are the paper's, 5 to 9 ours:

- 5: fine-grained labels (Xu et al. 2019);
- 6: weights searched on each seed's validation split (tune_loss_weights.py);
- 7: neighborhood batches;
- 8: a sentence encoder (--sentences) as text stream and as space of the neighbors;
- 9: beyond the paper: regularisation, soft targets, neighbors of both spaces, expansion, InfoNCE.

Any setting can be given; it holds for every method. Finished runs are reused, so a stopped call resumes when repeated.
With --jobs N, N processes of one thread each prepare, train and measure at once. The figures are those of one process
with one thread (OMP_NUM_THREADS=1). Writes OUT/tableN.md and OUT/tableN.json, and the output of the other scripts to
WORK-tables.log.
"""

import contextlib
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.command_line import make_parser, parse_settings, run_script, without
from pipeline.errors import UserError
from pipeline.files import read_json, write_json, write_text
from pipeline.pairs import distinct, image_root, read_pairs, rows_of_split
from pipeline.processes import in_order, one_thread_each
from pipeline.progress import ProgressBar
from pipeline.provenance import made_with
from pipeline.schema import Evaluation, Settings
from pipeline.settings import get, shown
from pipeline.steps import IMAGE_SPACES, STEPS
from pipeline.work import EVALUATIONS, Work, run_of
from readers.openclipart import openclipart
from reporting import filled_tables
from reporting.tables import OF_THE_PAPER, TABLES, Method, Table

if TYPE_CHECKING:
    from reporting.figures import Figure


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    argv: list[str]
    settings: Settings
    seeds: int
    tables: list[Table]
    methods: list[Method]
    """Rows of the tables, each once."""
    out: Path
    shared: list[str]
    """Flags that hold for every method and seed."""
    sentences: str = "all-MiniLM-L6-v2"
    """The sentence encoder of table 8."""
    jobs: int = 1
    """Processes that work at once."""

    def work(self, seed: int) -> Path:
        """WORK of a seed."""
        return self.settings.work_folder.with_name(f"{self.settings.work_folder.name}-seed={seed}")

    @property
    def dataset(self) -> str:
        return self.settings.dataset.name or self.settings.dataset.source

    @property
    def command(self) -> str:
        """The command as the tables quote it. Where data lie shapes no figure."""
        return f"python reproduce_tables.py {shlex.join(without(self.argv, PLACES))}"


TRIAL_SEED = 1000
"""The seed on whose validation split `Method.trials` are compared. It is in no table."""

PLACES = ("--dataset.root", "--dataset.manifest", "--features", "--sentences")


def main(argv: list[str] | None = None) -> None:
    request = read_request(sys.argv[1:] if argv is None else argv)
    runs = train_all(request)
    for method in request.methods:
        if not runs[method.name]:
            print(f"{method.name} is left out: it needs images with several texts, and there are none")
    figures = {name: [read_json(run / "metrics.json")["figures"] for run in of_name] for name, of_name in runs.items()}
    for table in request.tables:
        write_table(table, request, runs, figures)


def read_request(argv: list[str]) -> Request:
    """The command line. Raises UserError where it asks for what is not there."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; they are 0, 1, 2 ...")
    parser.add_argument("--tables", type=int, nargs="+", default=OF_THE_PAPER, help="tables to fill (default: 1 2 3 4)")
    parser.add_argument("--methods", nargs="+", help="only these rows, by name, such as OURS (default: all)")
    parser.add_argument(
        "--sentences",
        default=Request.sentences,
        metavar="NAME_OR_FOLDER",
        help=f"sentence encoder of table 8 (default: {Request.sentences})",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that work at once (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: results/ and the name of WORK)")
    settings, _, arguments = parse_settings(parser, argv)
    if arguments.seeds < 1:
        raise UserError("--seeds must be at least 1")
    if arguments.jobs < 1:
        raise UserError("--jobs must be at least 1")
    if unknown := set(arguments.tables) - set(TABLES):
        raise UserError(f"there is no table {min(unknown)}; --tables takes some of {sorted(TABLES)}")
    wanted = [TABLES[number] for number in arguments.tables]
    methods = list(dict.fromkeys(method for table in wanted for group in table.groups for method in group))
    if unknown := set(arguments.methods or ()) - {method.name for method in methods}:
        raise UserError(f"no row is called {min(unknown)}; --methods takes some of {[m.name for m in methods]}")

    own = ("--seeds", "--seed", "--tables", "--methods", "--sentences", "--jobs", "--out", "--work", "--features")
    shared = without(argv, own)
    if settings.dataset.source == "openclipart" and not settings.dataset.root:
        published = openclipart(settings.dataset, Work(settings.work_folder).published, settings.seed)
        shared += ["--dataset.root", str(published.root)]  # fetched once, for all seeds
    return Request(
        argv,
        settings,
        arguments.seeds,
        wanted,
        [method for method in methods if not arguments.methods or method.name in arguments.methods],
        arguments.out or Path("results") / settings.work_folder.name,
        shared,
        arguments.sentences,
        arguments.jobs,
    )


def train_all(request: Request) -> dict[str, list[Path]]:
    """The evaluated runs of every method, one a seed; none of a method that the dataset does not allow."""
    runs: dict[str, list[Path]] = {}
    for methods in alike(with_best_trials(request, request.methods)):
        runs |= evaluated(request, methods)
    return {method.name: runs[method.name] for method in request.methods}


def with_best_trials(request: Request, methods: Sequence[Method]) -> list[Method]:
    """The methods with the settings of the best of their `trials`, by Recall@1 on the validation split."""
    kinds = list(dict.fromkeys(method.trials for method in methods if method.trials))
    at_once(request, prepared, [(TRIAL_SEED, kinds)] if kinds else [], "seed")
    commands = {kind.name: commands_of(request, kind, TRIAL_SEED, kind.weights) for kind in kinds}
    runs = iter(at_once(request, trained, [command for of_kind in commands.values() for command in of_kind], "run"))
    best = {}
    for kind in kinds:
        of_kind = [next(runs) for _ in kind.choices]
        best[kind.name] = kind.choices[of_kind.index(best_on_validation(of_kind))]
    return [
        dataclasses.replace(method, settings={**best[method.trials.name], **method.settings})
        if method.trials
        else method
        for method in methods
    ]


def alike(methods: Sequence[Method]) -> list[list[Method]]:
    """The methods in groups that share the outputs of steps 0 to 3. These keep one table of neighbors a space."""
    shaping = {name for step in STEPS for name in step.settings} - {"neighbors.space"}
    groups: dict[frozenset[tuple[str, str]], list[Method]] = {}
    for method in methods:
        shared = frozenset((name, value) for name, value in method.settings.items() if name in shaping)
        groups.setdefault(shared, []).append(method)
    return list(groups.values())


def evaluated(request: Request, methods: Sequence[Method]) -> dict[str, list[Path]]:
    """The evaluated runs of some methods by name, one a seed; trained and evaluated where they do not exist yet."""
    seeds = range(request.seeds)
    weights = at_once(request, prepared, [(seed, methods) for seed in seeds], "seed")
    choices: dict[tuple[str, int], list[Path]] = {}
    trainings: dict[Path, list[str]] = {}  # of several methods that are the same run, one trains it
    for seed in seeds:
        for method, of_method in zip(methods, weights[seed], strict=True):
            commands = [] if of_method is None else commands_of(request, method, seed, of_method)
            choices[method.name, seed] = [run_of_command(command) for command in commands]
            trainings |= zip(choices[method.name, seed], commands, strict=True)
    at_once(request, trained, list(trainings.values()), "run")
    best = {which: best_on_validation(runs) for which, runs in choices.items() if runs}
    folders = measured_runs(request, methods, best)
    return {
        method.name: [folders[method.name, seed] for seed in seeds if (method.name, seed) in folders]
        for method in methods
    }


def measured_runs(
    request: Request, methods: Sequence[Method], runs: Mapping[tuple[str, int], Path]
) -> dict[tuple[str, int], Path]:
    """Evaluate the runs, by method and seed; returns the folders with their figures.

    Of a method's alternatives of evaluation each seed takes the best one on the validation split.
    """
    alternatives = {method.name: method.evaluations for method in methods}
    on_val: dict[Path, list[str]] = {}
    tried: dict[tuple[str, int], list[Path]] = {}
    for which, run in runs.items():
        several = alternatives[which[0]] if len(alternatives[which[0]]) > 1 else ()
        commands = [evaluation_of(request, run, {**changes, "evaluation.split": "val"}) for changes in several]
        tried[which] = [folder for folder, _ in commands]
        on_val |= dict(commands)
    at_once(request, measured, list(on_val.values()), "evaluation")
    chosen: dict[tuple[str, int], tuple[Path, list[str]]] = {}
    for which, run in runs.items():
        recalls = [kway_recall(folder) for folder in tried[which]] or [0.0]
        chosen[which] = evaluation_of(request, run, alternatives[which[0]][int(np.argmax(recalls))])
    at_once(request, measured, list(dict(chosen.values()).values()), "evaluation")
    return {which: folder for which, (folder, _) in chosen.items()}


def evaluation_of(request: Request, run: Path, changes: Mapping[str, str]) -> tuple[Path, list[str]]:
    """The folder of a run's evaluation and the arguments of step 5. One with other settings has a name of its own."""
    command = ["--run", str(run), *evaluation_flags(request.settings.evaluation)]
    if not changes:
        return run, command
    name = "-".join(f"{setting.removeprefix('evaluation.')}={value}" for setting, value in changes.items())
    return run / EVALUATIONS / name, [*command, *as_flags(changes), "--name", name]


def kway_recall(folder: Path) -> float:
    """K-way Recall@1 of an evaluation, the mean of both ways, at the first k."""
    figures = read_json(folder / "metrics.json")["figures"]
    of_all = {name: figure["value"] for name, figure in figures.items() if "way_recall_at_1_" in name}
    if not of_all:
        raise UserError(f"{folder} has no k-way Recall@1 by which to choose; get more validation pairs")
    first = next(iter(of_all)).partition("way_")[0]
    return float(np.mean([value for name, value in of_all.items() if name.partition("way_")[0] == first]))


def at_once(request: Request, function: Callable[[Request, Any], Any], items: Sequence[Any], unit: str) -> list[Any]:
    """`function(request, item)` of each item, in order; as many at once as the request says.

    What they print goes to the log. So does what processes beside this one write to stderr.
    """
    found = []
    work = functools.partial(logged, function, request)
    processes = min(request.jobs, len(items)) if request.jobs > 1 else 0
    threads = one_thread_each() if processes else contextlib.nullcontext()
    with threads, ProgressBar(total=len(items), desc=function.__name__, unit=unit) as progress:
        for result in in_order(work, items, processes, ahead=len(items)):
            found.append(result)
            progress.update()
    return found


def logged(function: Callable[[Request, Any], Any], request: Request, item: Any) -> Any:
    """`function(request, item)`; what it prints is appended to WORK-tables.log."""
    log = request.settings.work_folder.with_name(request.settings.work_folder.name + "-tables.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as redirected:
        file = redirected.enter_context(log.open("a", encoding="utf-8", buffering=1))
        redirected.enter_context(contextlib.redirect_stdout(file))
        if request.jobs > 1:
            redirected.enter_context(contextlib.redirect_stderr(file))
        return function(request, item)


FiguresOfRuns = Mapping[str, list[Mapping[str, "Figure"]]]
"""By method, the figures of its runs in the order of the seeds."""


def write_table(table: Table, request: Request, runs: Mapping[str, list[Path]], figures: FiguresOfRuns) -> None:
    """Fill a table, write it as JSON and Markdown, and print it. Nothing is written for a table without rows.

    Raises UserError where none of its columns was measured.
    """
    methods = [method for group in table.groups for method in group if runs.get(method.name)]
    names = [method.name for method in methods]
    if not names:
        return
    columns = []
    for metric in table.columns(request.settings.evaluation):
        if is_measured(metric.name, names, figures):
            columns.append(metric)
        else:
            print(f"table {table.number}: {metric.name} is left out: evaluate.py did not measure it on every run")
    if not columns:
        raise UserError(f"nothing of table {table.number} was measured; lower evaluation.preservation_k")
    values = {
        name: {metric.name: [run[metric.name]["value"] for run in figures[name]] for metric in columns}
        for name in names
    }
    chance = {metric.name: figures[names[0]][0][metric.name]["chance"] for metric in columns}
    resampled = filled_tables.resampled_runs(columns, {name: runs[name] for name in names})
    content = filled_tables.fill(table, columns, values, request.dataset, chance, resampled)
    markdown = filled_tables.to_markdown(content, heading(request)) + what_was_chosen(methods, runs)
    made = {"command": request.command, "seeds": list(range(request.seeds)), **made_with(threads(request.jobs))}
    made_by = {name: [run.as_posix().rpartition("/runs/")[2] for run in runs[name]] for name in names}
    path = request.out / f"table{table.number}.json"
    write_json(path, {**made, **content, "runs": made_by})
    write_text(path.with_suffix(".md"), markdown)
    print(f"{markdown}\nwrote {path}\nwrote {path.with_suffix('.md')}")


def threads(jobs: int) -> int:
    """Threads of each process that computes."""
    import torch

    return torch.get_num_threads() if jobs == 1 else 1


def is_measured(name: str, methods: list[str], figures: FiguresOfRuns) -> bool:
    """Whether all runs of these methods have the figure: a small test split has no 200 neighbors to preserve."""
    return all(name in run for method in methods for run in figures[method])


def what_was_chosen(methods: list[Method], runs: Mapping[str, list[Path]]) -> str:
    """Paragraphs: the best trial of each kind of rows, and the weights and evaluations that each seed takes."""
    from training.runs import read_run

    paragraphs = ""
    for kind, method in {method.trials: method for method in methods if method.trials}.items():
        settings, _ = read_run(run_of(runs[method.name][0]))
        found = ", ".join(f"`{name} {shown(get(settings, name))}`" for name in kind.choices[0])
        paragraphs += f"\n{kind.name}, best of {len(kind.choices)} trials on seed {TRIAL_SEED}: {found}\n"
    for method in methods:
        if method.tuned:
            weights = [read_run(run_of(folder))[1] for folder in runs[method.name]]
            found = ", ".join(f"`{of_seed.sym:g} {of_seed.img:g} {of_seed.text:g}`" for of_seed in weights)
            paragraphs += f"\n{method.name}, weights SYM IMG TEXT found for each seed: {found}\n"
        if len(method.evaluations) > 1:
            found = ", ".join(f"`{folder.name}`" for folder in runs[method.name])
            paragraphs += f"\n{method.name}, evaluation chosen for each seed: {found}\n"
    return paragraphs


def heading(request: Request) -> str:
    """The line above a table: dataset, seeds, encoders, command."""
    image, text = request.settings.model.image, request.settings.model.text
    return (
        f"{request.dataset}, {request.seeds} {'seed' if request.seeds == 1 else 'seeds'}, {image.backbone} "
        f"({image.weights}, {'fine-tuned' if image.trainable else 'frozen'}), {text.encoder}: `{request.command}`"
    )


def evaluation_flags(evaluation: Evaluation) -> list[str]:
    """The settings as flags of evaluate.py, so that all runs are measured alike."""
    values = evaluation.model_dump().items()
    return as_flags(
        {f"evaluation.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in values}
    )


def prepared(request: Request, seed_and_methods: tuple[int, Sequence[Method]]) -> list[tuple[float, ...] | None]:
    """Run what comes before training, for one seed. Returns the loss weights of every method.

    None stands for a method that needs images with several texts, where no train image has them.
    """
    import extract_doc2vec_vectors
    import extract_image_features
    import knn_document_features
    import prepare_dataset
    import train_doc2vec
    import train_siamese_labels
    import tune_loss_weights

    seed, methods = seed_and_methods
    found: list[tuple[float, ...] | None] = []
    for method in methods:
        prepare_dataset.main(flags_of(request, method, seed))
        if method.several_texts and not several_texts(request.work(seed)):
            found.append(None)
            continue
        flags = flags_of(request, method, seed)
        settings = parse_settings(make_parser(""), flags)[0]
        train_doc2vec.main(flags)
        extract_doc2vec_vectors.main(flags)
        if settings.neighbors.space in IMAGE_SPACES:
            extract_image_features.main(flags)
        knn_document_features.main(flags)
        if settings.loss.base == "fine_grained" and settings.loss.labels == "siamese":
            train_siamese_labels.main(flags)
        tuned = tune_loss_weights.main(flags) if method.tuned else {}
        found.append(dataclasses.astuple(tuned[method.tuned]) if method.tuned else method.weights)
    return found


def flags_of(request: Request, method: Method, seed: int) -> list[str]:
    """The flags of a method's scripts for one seed."""
    work = request.work(seed)
    features = request.settings.features_folder
    if (work / "pairs.parquet").is_file() and image_root(work).is_relative_to(work.absolute()):
        features = work / "features"  # images that are drawn by seed
    own = {name: value.format(sentences=request.sentences) for name, value in method.settings.items()}
    places = ["--work", str(work), "--features", str(features)]
    return [*request.shared, "--seed", str(seed), *places, *as_flags(own)]


def as_flags(settings: Mapping[str, str]) -> list[str]:
    """Settings by dotted name as flags."""
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def commands_of(request: Request, method: Method, seed: int, weights: Sequence[float]) -> list[list[str]]:
    """The arguments of step 4 for each alternative of a method."""
    given = [f"{weight:g}" for weight in weights]
    flags = flags_of(request, method, seed)
    return [[*given, *flags, *as_flags(choice), "--resume", "--refresh"] for choice in method.choices]


def run_of_command(command: list[str]) -> Path:
    """The run's folder of a command of step 4."""
    from train_cross_modal_retrieval_model import folder_of, parse

    return folder_of(*parse(command))


def trained(request: Request, command: list[str]) -> Path:
    """Train a run where it is not finished yet."""
    import train_cross_modal_retrieval_model

    return train_cross_modal_retrieval_model.main(command)


def best_on_validation(runs: Sequence[Path]) -> Path:
    """Of some runs the one with the highest Recall@1 on the validation split."""
    return max(runs, key=lambda run: read_json(run / "run.json")["val_recall_at_1"])


def measured(request: Request, command: list[str]) -> None:
    """Evaluate a run where it is not evaluated so yet."""
    import evaluate

    evaluate.main(command)


def several_texts(work: Path) -> bool:
    """Whether a train image in WORK has more than one text."""
    table = read_pairs(work, ["image_id", "split"])
    numbers = distinct(table["image_id"])[0][rows_of_split(table, "train")]
    return len(np.unique(numbers)) < len(numbers)


if __name__ == "__main__":
    run_script(main)
