"""The sections of the report. Each is a function from the compared runs to what its template shows.

To add a section: write a function here, a line in SECTIONS, and a template of that name in report_sections/.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metrics import WAYS, Metric
from pipeline.files import read_array, read_json
from pipeline.pairs import SPLITS, read_pairs
from pipeline.schema import Settings
from pipeline.settings import flatten
from ranking import gap_of_own, nearest, rank_of_own
from reporting import plots
from reporting.answers import near_words
from reporting.compared_runs import ComparedRuns
from reporting.figures import RunScores, measured_metrics
from training.proximity import doc2vec_neighbors, pair_distances
from training.runs import read_run

NEIGHBOR_PAIRS = 10_000
"""Pairs of neighbors, at most, whose distances are compared: the number of the paper's Fig. 5."""
EXTREMES = 2
"""Pairs shown with the smallest and with the largest ratio: the number of the paper's Fig. 5."""
KEPT_BY = ("images", "texts")
"""Directions of the metrics of neighborhood preservation."""
MAP_PAIRS = 200
MAP_CATEGORIES = len(plots.CATEGORIES) - 1


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks the report for."""

    queries: Sequence[int] | None = None
    """Pair numbers to search by; None: drawn by seed."""
    words: Sequence[str] = ()
    """Single words to search by."""
    count: int = 6
    """Queries that are drawn."""
    top: int = 3
    """Results of a query: the number of the paper's Fig. 6."""


# --- Retrieval -------------------------------------------------------------------------------------------------------


def retrieval(runs: ComparedRuns, options: Options) -> list[dict[str, Any]]:
    """What some pairs' images find among the texts, and their texts among the images."""
    return [
        retrieval_of_pair(runs, position, options.top) for position in runs.positions_of(options.queries, options.count)
    ]


def retrieval_of_pair(runs: ComparedRuns, position: int, top: int) -> dict[str, Any]:
    """What a pair's image finds among the texts, and its text among the images, in every run."""
    words = runs.words[position]
    everything = np.arange(len(runs.rows))
    return {
        "query": runs.item(position),
        "texts": [_ranked(runs, y, x[position], everything, top, words, position) for x, y in runs.embeddings],
        "images": [_ranked(runs, x, y[position], runs.images, top, words, position) for x, y in runs.embeddings],
    }


def single_words(runs: ComparedRuns, options: Options) -> list[dict[str, Any]] | None:
    """What single words find among the images in every run (the paper's Fig. 6), or why they cannot be searched."""
    found = []
    for word in options.words:
        parts = set(runs.encoders[0].tokenizer.words(word))
        texts = sum(parts <= of_text for of_text in runs.words) if parts else None
        found.append({"word": word, "texts": texts, "runs": _retrieval_by_word(runs, word, options.top)})
    return found or None


def _retrieval_by_word(runs: ComparedRuns, word: str, top: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for encoder, (x, _) in zip(runs.encoders, runs.embeddings, strict=True):
        (query,), problems = encoder.texts([word])
        known, unknown = encoder.words(word)
        if problems:
            near = [other for one in unknown for other in near_words(one, encoder.vocabulary)]
            found.append({"problem": problems[0], "near": near})
        else:
            found.append(_ranked(runs, x, query, runs.images, top, set(known), None))
    return found


def _ranked(
    runs: ComparedRuns,
    vectors: np.ndarray,
    query: np.ndarray,
    among: np.ndarray,
    top: int,
    words: set[str],
    position: int | None,
) -> dict[str, Any]:
    """The `top` items nearest to a query, the rank of its best own item, and its gap to the best other.

    vectors: (R, D) or (R, K, D). among: positions that are searched. position: the query's; None: it has no own item.
    """
    gallery = vectors[among]
    own = np.zeros(len(among), dtype=bool) if position is None else runs.groups[among] == runs.groups[position]
    results = [
        {"rank": rank, "score": score, "own": bool(own[place]), **runs.item(int(among[place]), words)}
        for rank, (place, score) in enumerate(nearest(gallery, query, top, own=own), start=1)
    ]
    found = {"results": results, "of": len(among), "rank": None, "gap": None}
    if own.any():
        found |= {"rank": rank_of_own(gallery, query, own), "gap": gap_of_own(gallery, query, own)}
    return found


# --- Semantic proximity ----------------------------------------------------------------------------------------------


def proximity(runs: ComparedRuns, _: Options) -> dict[str, Any]:
    """Distances of Doc2Vec neighbors in the joint space (Fig. 5): of two runs the ratio, of one also random pairs'."""
    near, random = neighbor_pairs(runs)
    kinds = [_proximity_of(runs, kind, place, near, random) for place, kind in enumerate(("images", "texts"))]
    return {"k": runs.settings.neighbors.k, "texts": len(runs.rows), "pairs": len(near), "kinds": kinds}


def neighbor_pairs(runs: ComparedRuns) -> tuple[np.ndarray, np.ndarray]:
    """Positions (P, 2) of pairs of different images: Doc2Vec neighbors, and random ones. By seed, at most 10,000.

    Neighbors are the `neighbors.k` nearest texts of the evaluated split, as those of Eq. 5 are of the train split.
    """
    rng, count, groups = runs.rng(), len(runs.rows), runs.groups
    vectors = np.array(read_array(runs.work.vectors)[runs.rows], dtype=np.float32)
    anchors = np.sort(rng.permutation(count)[:NEIGHBOR_PAIRS])
    near = doc2vec_neighbors(vectors, groups, anchors, runs.settings.neighbors.k)
    near = np.unique(np.sort(near, axis=1), axis=0)
    near = near[np.sort(rng.permutation(len(near))[:NEIGHBOR_PAIRS])]
    random = rng.integers(count, size=(2 * NEIGHBOR_PAIRS, 2))
    return near, random[groups[random[:, 0]] != groups[random[:, 1]]][:NEIGHBOR_PAIRS]


def _proximity_of(
    runs: ComparedRuns, kind: str, place: int, near_pairs: np.ndarray, random_pairs: np.ndarray
) -> dict[str, Any]:
    vectors = [of_run[place] for of_run in runs.embeddings]
    near, random = (
        [pair_distances(of_run[pairs[:, 0]], of_run[pairs[:, 1]]) for of_run in vectors]
        for pairs in (near_pairs, random_pairs)
    )
    table = [
        {"near": np.median(a), "random": np.median(b), "quotient": np.median(a) / max(np.median(b), 1e-12)}
        for a, b in zip(near, random, strict=True)
    ]
    if len(near) == 2:
        usable = np.flatnonzero((near[0] > 1e-6) & (near[1] > 1e-6))
        values = near[0][usable] / near[1][usable]
        title = f"Distances of neighboring {kind}: A over B"
        plot = plots.ratios(title, values, "distance in A / distance in B") if len(values) else None
    else:
        usable, values = np.arange(len(near[0])), near[0]
        title, colours = f"Distances of neighboring and of random {kind}", (plots.RUNS[0], plots.FAINT)
        plot = plots.distribution(title, [near[0], random[0]], "distance in the joint space", colours=colours)
    order = np.argsort(values, kind="stable")
    extremes = {"smallest": order[:EXTREMES], "largest": order[::-1][:EXTREMES]}
    return {
        "kind": kind,
        "plot": plot,
        "table": table,
        "left_out": len(near_pairs) - len(usable),
        "median": float(np.median(values)) if len(values) else None,
        "below_one": float((values < 1).mean()) if len(values) else None,
        "extremes": [
            {"name": name, "pairs": [_pair_with_value(runs, near_pairs[usable[n]], values[n]) for n in numbers]}
            for name, numbers in extremes.items()
        ],
    }


def _pair_with_value(runs: ComparedRuns, positions: np.ndarray, value: float) -> dict[str, Any]:
    return {"value": float(value), "items": [runs.item(int(position)) for position in positions]}


# --- Figures ---------------------------------------------------------------------------------------------------------


def figures(runs: ComparedRuns, _: Options) -> dict[str, Any]:
    """What evaluate.py measured: the figures that decide, bars, all figures; or why a run has no figures.

    Recall@K and neighborhood preservation decide. Of two runs the tables have paired differences.
    """
    measured, problems = runs.figures
    names = list(dict.fromkeys(name for of_run in measured if of_run for name in of_run))
    differences: dict[str, str] = {}
    if len(measured) == 2 and all(measured):
        ours, baseline = (RunScores(encoder.run) for encoder in runs.encoders)
        if ours.has_same_pairs(baseline):
            differences = {name: ours.difference(baseline, name) for name in names}
    table = [
        {
            "name": runs.metrics[name].title if name in runs.metrics else name.replace("_", " "),
            "decides": name in runs.metrics and _decides(runs.metrics[name]),
            "figures": [of_run and of_run.get(name) for of_run in measured],
            "difference": differences.get(name, ""),
        }
        for name in names
    ]
    bars = _bars(runs, WAYS, "Recall, {}", "share of the queries; mAP: mean precision")
    return {"problems": problems, "recalls": bars, "table": table, "differences": bool(differences)}


def _decides(metric: Metric) -> bool:
    return "Recall@" in metric.label or metric.direction in KEPT_BY


def neighborhoods(runs: ComparedRuns, _: Options) -> list[dict[str, Any]]:
    """Bars of neighborhood preservation; empty where it was not measured."""
    return _bars(runs, KEPT_BY, "Neighborhoods kept, {}", "share of the Doc2Vec neighbors")


def _bars(runs: ComparedRuns, directions: Sequence[str], title: str, label: str) -> list[dict[str, Any]]:
    """A plot for each direction: the metrics with that direction that are shares."""

    def row(metric: Metric) -> tuple[str, list[Any]]:
        return metric.label, [of_run and of_run.get(metric.name) for of_run in runs.figures[0]]

    drawn = []
    for direction in directions:
        shares = [row(metric) for metric in runs.metrics.values() if metric.is_share and metric.direction == direction]
        if rows := [(name, values) for name, values in shares if any(values)]:
            caption = title.format(direction.replace("_", " "))
            drawn.append({"title": caption, "plot": plots.bars(caption, rows, label)})
    return drawn


# --- Map -------------------------------------------------------------------------------------------------------------


def joint_space_map(runs: ComparedRuns, _: Options) -> dict[str, Any]:
    """A t-SNE map of drawn pairs in each run, coloured by category where there are categories."""
    from sklearn.manifold import TSNE

    count = min(MAP_PAIRS, len(runs.images))
    drawn = np.sort(runs.rng().choice(runs.images, count, replace=False))
    colours, legend = _category_colours(runs, drawn)
    drawings = []
    for letter, (x, y) in zip(runs.letters, runs.embeddings, strict=True):
        images, texts = closest_of_pairs(x[drawn], y[drawn])
        perplexity = min(30, (2 * count - 1) / 3)
        tsne = TSNE(init="pca", perplexity=perplexity, random_state=runs.settings.seed, n_jobs=1)
        points = tsne.fit_transform(np.concatenate([images, texts]).astype(np.float32))
        title = f"Map of the joint space of run {letter}"
        drawings.append(plots.scatter(title, points[:count], points[count:], colours))
    return {"count": count, "legend": legend, "plots": drawings}


def _category_colours(runs: ComparedRuns, positions: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Colour numbers of pairs (n,), and the legend: colour number and name of each category shown."""
    categories = runs.data.categories[runs.rows[positions]]
    frequent = [number for number, _ in Counter(categories[categories >= 0].tolist()).most_common(MAP_CATEGORIES)]
    numbers = {category: number for number, category in enumerate(frequent)}
    other = len(plots.CATEGORIES) - 1 if frequent else 0
    colours = np.array([numbers.get(category, other) for category in categories.tolist()])
    legend = [(number, runs.data.category_names[category]) for category, number in numbers.items()]
    if frequent and (colours == other).any():
        legend.append((other, "other, or none"))
    return colours, legend


def closest_of_pairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The closest two vectors of each pair, both (n, D), of PVSE embeddings (n, K, D). (n, D) are returned as given."""
    if x.ndim == 2:
        return x, y
    scores = np.einsum("nkd,njd->nkj", x, y).reshape(len(x), -1)
    first, second = np.divmod(scores.argmax(axis=1), y.shape[1])
    places = np.arange(len(x))
    return x[places, first], y[places, second]


# --- Training --------------------------------------------------------------------------------------------------------

LOSS_TITLES = {
    "data/train_loss": "Training loss",
    "data/val_loss": "Validation loss",
    "data/l_i2t": "Image to text",
    "data/l_sym": "Text to image (symmetric)",
    "data/l_img": "L_img: images of neighbors",
    "data/l_text": "L_text: neighboring texts",
}


def training_curves(runs: ComparedRuns, _: Options) -> list[dict[str, Any]]:
    """A plot of every curve that a run has, as TensorBoard's own reader reads it."""
    logs = [read_scalars(encoder.run) for encoder in runs.encoders]
    tags = sorted(set().union(*logs))
    shown = {tag: (title, "loss term" if "data/l_" in tag else "weighted sum") for tag, title in LOSS_TITLES.items()}
    # The validation loss has the weights of no run.
    val_terms = {validation_terms(encoder.settings) for encoder in runs.encoders}
    shown["data/val_loss"] = LOSS_TITLES["data/val_loss"], " or ".join(sorted(val_terms))
    shown |= {tag: (tag.removeprefix("data/"), "loss term") for tag in tags if "data/l_" in tag and tag not in shown}
    for encoder in runs.encoders:
        names = (tag.removeprefix("val/") for tag in tags)
        for metric in measured_metrics(encoder.settings.evaluation, names).values():
            if metric.every_epoch:
                shown[f"val/{metric.name}"] = f"Validation {metric.title}", "share" if metric.is_share else ""
    drawn = []
    for tag, (title, label) in shown.items():
        lines = [log.get(tag) for log in logs]
        if any(line is not None for line in lines):
            missing = [letter for letter, line in zip(runs.letters, lines, strict=True) if line is None]
            drawn.append({"title": title, "plot": plots.curves(title, lines, label), "missing": missing})
    return drawn


def validation_terms(settings: Settings) -> str:
    """What the validation loss of a run is the sum of."""
    if settings.loss.base == "fine_grained":
        return "pairwise loss"
    return settings.training.val_loss.replace("_", " + ")


def read_scalars(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and finite values of a run's TensorBoard scalars, by tag; without those that have none.

    A file that is torn or damaged is read up to there; a line says so.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(run.glob("events.out.tfevents.*")):
        whole = 0
        for record in RawEventFileLoader(str(path)).Load():
            whole += len(record) + 16  # its length, and two checksums
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("simple_value") and np.isfinite(value.simple_value):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
        if whole < (size := path.stat().st_size):
            print(f"{path} is torn or damaged after {whole:,} of {size:,} bytes: the curves are without the rest")
    columns = {tag: tuple(np.array(column) for column in zip(*events, strict=True)) for tag, events in found.items()}
    return {tag: (steps, values) for tag, (steps, values) in columns.items()}


# --- How it was made -------------------------------------------------------------------------------------------------


def how_made(runs: ComparedRuns, _: Options) -> dict[str, Any]:
    """Settings, those that differ first; pairs by split; rejected rows; training times; versions."""
    trees = []
    for encoder in runs.encoders:
        settings, weights = read_run(encoder.run)
        of_weights = {f"weight {name}": value for name, value in dataclasses.asdict(weights).items()}
        trees.append(of_weights | flatten(settings))
    settings_table = [(name, [str(tree[name]) for tree in trees]) for name in trees[0]]
    stamp = runs.work.folder / "prepare_dataset.json"
    prepared = read_json(stamp)["figures"] if stamp.is_file() else {}
    counts = Counter(read_pairs(runs.work.folder, ["split"])["split"].to_pylist())
    trained = [read_json(encoder.run / "run.json") for encoder in runs.encoders]
    libraries = dict.fromkeys(name for run in trained for name in run["versions"])
    return {
        "settings": settings_table,
        "differing": [(name, values) for name, values in settings_table if len(set(values)) > 1],
        "splits": [(split, counts[split], len(runs.data.rows[split])) for split in SPLITS],
        "rejected": list(prepared.get("rejected", {}).items()),
        "published": prepared.get("published"),
        "images": prepared.get("images"),
        "runs": trained,
        "versions": [(name, [run["versions"].get(name, "") for run in trained]) for name in libraries],
    }


Section = Callable[[ComparedRuns, Options], Any]

SECTIONS: dict[str, tuple[str, Section]] = {
    "figures": ("Figures", figures),
    "neighborhoods": ("Neighborhoods", neighborhoods),
    "retrieval": ("Retrieval", retrieval),
    "words": ("Single words", single_words),
    "proximity": ("Semantic proximity", proximity),
    "map": ("Map of the joint space", joint_space_map),
    "training": ("Training", training_curves),
    "made": ("How it was made", how_made),
}
"""Title and function of every section, by the name of its template, in the page's order: what decides is first.

A section that returns None is left out.
"""
