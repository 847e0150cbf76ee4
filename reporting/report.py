"""What the report shows, section by section."""

import base64
import dataclasses
import functools
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sklearn.manifold import TSNE
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tqdm import tqdm

from datasets import Prepared, load_prepared
from images.files import UnreadableImage, load_thumbnail
from pipeline.errors import UserError
from pipeline.files import read_array, read_json
from pipeline.pairs import SPLITS, read_pairs
from pipeline.settings import flatten
from ranking import nearest, rank_of_own
from reporting import plots
from reporting.answers import near_words
from reporting.figures import difference, read_figures, read_queries
from text_space.tokenizer import RULED, UNSEGMENTED
from training.embedding import embed_split
from training.encoder import RunEncoder
from training.proximity import NEIGHBOR_SHARE
from training.runs import Weights, read_run

NEIGHBOR_PAIRS = 10_000
"""Pairs of neighbors, at most, whose distances are compared: the number of the paper's Fig. 5."""


EXTREMES = 5


MAP_PAIRS = 200


MAP_CATEGORIES = len(plots.CATEGORIES) - 1


THUMBNAIL = 176  # pixels of the longer side


SHOWN = 260  # characters of a text


LETTERS = "AB"
"""What the report calls the runs."""


class Compared:
    """One run or two, and the embeddings of their test pairs. R pairs.

    Raises UserError where two runs are not of the same pairs.
    """

    def __init__(self, encoders: Sequence[RunEncoder]) -> None:
        self.encoders = encoders
        for encoder in encoders:  # what was evaluated is reported, whatever split the run was trained to be tested on
            if (encoder.run / "metrics.json").is_file():
                encoder.settings.evaluation.split = read_json(encoder.run / "metrics.json")["split"]
        first = encoders[0]
        self.settings = first.settings
        self.split = self.settings.evaluation.split
        inputs = [read_json(encoder.run / "inputs.json") for encoder in encoders]
        prepared = [load_prepared(encoder.settings) for encoder in encoders]
        self.data: Prepared = prepared[0]
        self.rows = self.data.rows[self.split]
        """(R,) int64, the pairs."""
        for encoder, data, found in zip(encoders[1:], prepared[1:], inputs[1:], strict=True):
            if found["pairs.parquet"] != inputs[0]["pairs.parquet"]:
                raise UserError(
                    f"{encoder.run} and {first.run} were trained on different pairs.parquet, so that nothing can be "
                    "compared; name two runs of one WORK"
                )
            if encoder.settings.evaluation.split != self.split or not np.array_equal(data.rows[self.split], self.rows):
                raise UserError(
                    f"{encoder.run} and {first.run} cannot use the same pairs (other known words, or evaluated on "
                    "another split); name two runs of one WORK, evaluated alike"
                )
        self.embeddings = [self._embed(encoder, data) for encoder, data in zip(encoders, prepared, strict=True)]
        """Of each run, x and y, (R, D) or (R, K, D): its images and texts, unit vectors."""
        table = read_pairs(self.settings.work_folder, ["text", "image_path"]).take(self.rows)
        self.texts: list[str] = table["text"].to_pylist()
        self.paths = [self.data.images.root / path for path in table["image_path"].to_pylist()]
        self.groups = self.data.image_ids[self.rows]
        self.images = np.sort(np.unique(self.groups, return_index=True)[1])
        """Positions of the first pair of each image, ascending."""

    @staticmethod
    def _embed(encoder: RunEncoder, data: Prepared) -> tuple[np.ndarray, np.ndarray]:
        x, y = embed_split(encoder.model, data, encoder.settings, encoder.device)
        return x.float().cpu().numpy(), y.float().cpu().numpy()

    def rng(self) -> np.random.Generator:
        """A generator of the first run's seed, always at its beginning."""
        return np.random.default_rng(self.settings.seed)

    def positions_of(self, pairs: Sequence[int] | None, count: int) -> list[int]:
        """Where these pairs stand in `rows`, or those of `count` drawn images; raises UserError for other pairs."""
        if pairs is None:
            drawn = self.rng().choice(self.images, min(count, len(self.images)), replace=False)
            return np.sort(drawn).tolist()
        for pair in pairs:
            if pair not in self.rows:
                raise UserError(
                    f"--queries {pair} is no pair of the {self.split} split with a known word; its pairs are numbered "
                    f"from {self.rows[0]} to {self.rows[-1]}, as in pairs.parquet"
                )
        return np.searchsorted(self.rows, pairs).tolist()

    @functools.cache  # noqa: B019 - there is but one object
    def thumbnail(self, position: int) -> str | None:
        """The pair's image as a data URI; None where it cannot be read any more."""
        try:
            image = load_thumbnail(self.paths[position], THUMBNAIL, self.settings.dataset.max_pixels)
        except UnreadableImage:
            return None
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=72, method=4)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

    def item(self, position: int, words: Iterable[str] = ()) -> dict[str, Any]:
        """A pair as the report shows it: number, thumbnail, and its text in parts, those among `words` marked."""
        text = " ".join(self.texts[position].split())
        shown = text if len(text) <= SHOWN else text[:SHOWN].rstrip() + "…"
        found = set(words) & set(self.encoders[0].tokenizer.words(self.texts[position]))
        parts = marked(shown, found, self.encoders[0].tokenizer.language)
        return {"pair": int(self.rows[position]), "image": self.thumbnail(position), "text": shown, "parts": parts}


def marked(text: str, words: Iterable[str], language: str) -> list[tuple[str, bool]]:
    """`text` in parts, and of each whether it is one of `words`: whole ones, in languages with blanks between them."""
    likeliest = "|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word))))
    if not likeliest:
        return [(text, False)]
    pattern = f"({likeliest})" if language in (*RULED, *UNSEGMENTED) else rf"(?<!\w)({likeliest})(?!\w)"
    parts = re.split(pattern, text, flags=re.IGNORECASE)
    return [(part, number % 2 == 1) for number, part in enumerate(parts) if part]


def retrieval(compared: Compared, position: int, top: int) -> dict[str, Any]:
    """What a pair's image finds among the texts, and its text among the images, in every run."""
    words = set(compared.encoders[0].tokenizer.words(compared.texts[position]))
    everything = np.arange(len(compared.rows))
    found: dict[str, Any] = {"query": compared.item(position), "texts": [], "images": []}
    for x, y in compared.embeddings:
        found["texts"].append(ranked(compared, y, x[position], everything, top, words, position))
        found["images"].append(ranked(compared, x, y[position], compared.images, top, words, position))
    return found


def ranked(
    compared: Compared,
    vectors: np.ndarray,
    query: np.ndarray,
    among: np.ndarray,
    top: int,
    words: set[str],
    position: int | None,
) -> dict[str, Any]:
    """The `top` items `among` these positions nearest to a query and, where `position` says whose it is, the rank of
    its best own item."""
    gallery = vectors[among]
    own = np.zeros(len(among), dtype=bool) if position is None else compared.groups[among] == compared.groups[position]
    results = [
        {"rank": rank, "score": score, "own": bool(own[place]), **compared.item(int(among[place]), words)}
        for rank, (place, score) in enumerate(nearest(gallery, query, top, own=own), start=1)
    ]
    rank = rank_of_own(gallery, query, own) if own.any() else None
    return {"results": results, "rank": rank, "of": len(among)}


def retrieval_by_word(compared: Compared, word: str, top: int) -> dict[str, Any]:
    """What a word finds among the images in every run, or what is wrong with it."""
    found: dict[str, Any] = {"word": word, "runs": []}
    for encoder, (x, _) in zip(compared.encoders, compared.embeddings, strict=True):
        (query,), problems = encoder.texts([word])
        if problems:
            near = [other for unknown in encoder.words(word)[1] for other in near_words(unknown, encoder.vocabulary)]
            found["runs"].append({"problem": problems[0], "near": near})
        else:
            words = set(encoder.words(word)[0])
            found["runs"].append(ranked(compared, x, query, compared.images, top, words, None))
    return found


@dataclass
class Neighbors:
    """Pairs of items that are neighbors in Doc2Vec space, and as many random ones. P pairs."""

    near: np.ndarray
    """(P, 2) int64, positions."""
    random: np.ndarray
    """(Q, 2) int64, positions."""
    k: int
    """Neighbors of an item."""


def neighbor_pairs(compared: Compared) -> Neighbors:
    """Up to NEIGHBOR_PAIRS pairs of different images whose texts are Doc2Vec neighbors, and of random ones, by seed.

    Neighbors are the 1 % nearest of the split's texts (one at least) by Euclidean distance, as in evaluate.py.
    """
    rng, count, groups = compared.rng(), len(compared.rows), compared.groups
    vectors = read_array(compared.settings.work_folder / "doc2vec" / "vectors.npy")
    reference = torch.from_numpy(np.array(vectors[compared.rows], dtype=np.float32))
    k = min(max(round(NEIGHBOR_SHARE * count), 1), count)
    anchors = np.sort(rng.permutation(count)[:NEIGHBOR_PAIRS])
    found = []
    for part in tqdm(np.array_split(anchors, -(-len(anchors) // 256)), desc="neighbors", leave=False, disable=None):
        apart = torch.cdist(reference[part], reference)
        apart[torch.from_numpy(groups[part][:, None] == groups)] = torch.inf
        near = apart.topk(k, largest=False)
        line, place = torch.nonzero(near.values.isfinite(), as_tuple=True)
        found.append(np.column_stack([part[line.numpy()], near.indices[line, place].numpy()]))
    near = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    near = near[np.sort(rng.permutation(len(near))[:NEIGHBOR_PAIRS])]
    random = rng.integers(count, size=(2 * NEIGHBOR_PAIRS, 2))
    return Neighbors(near, random[groups[random[:, 0]] != groups[random[:, 1]]][:NEIGHBOR_PAIRS], k)


def pair_distances(vectors: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Euclidean distances (P,), from 0 to 2, of pairs (P, 2) of unit vectors (R, D), or of the closest of (R, K, D)."""
    vectors = vectors if vectors.ndim == 3 else vectors[:, None]
    found = []
    for part in np.array_split(pairs, -(-len(pairs) // 4096) or 1):
        differences = vectors[part[:, 0], :, None] - vectors[part[:, 1], None]
        found.append(np.sqrt((differences.astype(np.float64) ** 2).sum(axis=-1)).min(axis=(1, 2)))
    return np.concatenate(found)


def proximity(compared: Compared) -> dict[str, Any]:
    """Distances of neighbors in the joint space: with two runs their ratio, with one beside those of random pairs."""
    pairs = neighbor_pairs(compared)
    found: dict[str, Any] = {"k": pairs.k, "pairs": len(pairs.near), "kinds": []}
    for kind, place in (("images", 0), ("texts", 1)):
        near = [pair_distances(of_run[place], pairs.near) for of_run in compared.embeddings]
        random = [pair_distances(of_run[place], pairs.random) for of_run in compared.embeddings]
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
            title = f"Distances of neighboring and of random {kind}"
            plot = plots.distribution(
                title, [near[0], random[0]], "distance in the joint space", colours=(plots.RUNS[0], plots.FAINT)
            )
        order = np.argsort(values, kind="stable")
        shown = (("smallest", order[:EXTREMES]), ("largest", order[::-1][:EXTREMES]))
        found["kinds"].append(
            {
                "kind": kind,
                "plot": plot,
                "table": table,
                "left_out": len(pairs.near) - len(usable),
                "median": float(np.median(values)) if len(values) else None,
                "below_one": float((values < 1).mean()) if len(values) else None,
                "extremes": [
                    {
                        "name": name,
                        "pairs": [
                            {
                                "value": float(values[number]),
                                "items": [compared.item(int(position)) for position in pairs.near[usable[number]]],
                            }
                            for number in numbers
                        ],
                    }
                    for name, numbers in shown
                ],
            }
        )
    return found


CURVES = {
    "data/train_loss": ("Training loss", "weighted sum"),
    "data/val_loss": ("Validation loss", "weighted sum"),
    "data/l_i2t": ("Image to text", "loss term"),
    "data/l_sym": ("Text to image (symmetric)", "loss term"),
    "data/l_img": ("L_img: images of neighbors", "loss term"),
    "data/l_text": ("L_text: neighboring texts", "loss term"),
}


NAMES = (
    (r"(\d+)way_recall_at_1", r"\1-way Recall@1"),
    (r"recall_at_(\d+)", r"Recall@\1"),
    (r"preservation_1_percent", "nearest 1 %"),
    (r"preservation_(\d+)", r"nearest \1"),
    (r"^map$", "mAP"),
    (r"median_rank", "median rank"),
)


def training_curves(compared: Compared) -> list[dict[str, Any]]:
    """A plot of every curve that one of the runs has; read by TensorBoard's own reader."""
    logs = []
    for encoder in compared.encoders:
        log = EventAccumulator(str(encoder.run), size_guidance={SCALARS: 0})
        log.Reload()
        logs.append(log)
    tags = [set(log.Tags()[SCALARS]) for log in logs]
    shown = dict(CURVES)
    others = {tag for tag in set().union(*tags) if tag.startswith("data/l_")} - shown.keys()
    shown |= {tag: (tag.removeprefix("data/"), "loss term") for tag in sorted(others)}
    ways = (re.fullmatch(r"val/(\d+)way_recall_at_1_(image_to_text|text_to_image)", tag) for tag in set().union(*tags))
    for found in sorted(filter(None, ways), key=lambda found: (int(found[1]), found[2])):
        shown[found[0]] = (f"Validation {found[1]}-way Recall@1, {found[2].replace('_', ' ')}", "share")
    drawn = []
    for tag, (title, label) in shown.items():
        lines = []
        for log, there in zip(logs, tags, strict=True):
            events = log.Scalars(tag) if tag in there else []
            finite = [event for event in events if np.isfinite(event.value)]
            points = np.array([event.step for event in finite]), np.array([event.value for event in finite])
            lines.append(points if finite else None)
        if any(line is not None for line in lines):
            missing = [LETTERS[number] for number, line in enumerate(lines) if line is None]
            drawn.append({"title": title, "plot": plots.curves(title, lines, label), "missing": missing})
    return drawn


def readable(name: str) -> str:
    """The name of a figure without its direction, for people."""
    for pattern, shown in NAMES:
        name = re.sub(pattern, shown, name)
    return name


def figures(compared: Compared) -> dict[str, Any]:
    """What evaluate.py measured: bars, and a table with the paired differences; or why there is none."""
    measured: list[dict[str, Any] | None] = []
    problems = []
    for encoder in compared.encoders:
        try:
            measured.append(read_figures(encoder.run))
        except UserError as error:
            measured.append(None)
            problems.append(str(error))
    names = list(dict.fromkeys(name for of_run in measured if of_run for name in of_run))

    def rows(suffix: str, wanted: str) -> list[tuple[str, list[Any]]]:
        return [
            (readable(name.removesuffix(suffix)), [of_run and of_run.get(name) for of_run in measured])
            for name in names
            if name.endswith(suffix) and re.search(wanted, name)
        ]

    recalls, kept = [], []
    for suffix, way in (("_image_to_text", "image to text"), ("_text_to_image", "text to image")):
        if some := rows(suffix, r"recall_at|^map"):
            title = f"Recall, {way}"
            recalls.append(
                {"title": title, "plot": plots.bars(title, some, "share of the queries; mAP: mean precision")}
            )
    for suffix in ("_images", "_texts"):
        if some := rows(suffix, "^preservation"):
            title = f"Neighborhoods kept, {suffix[1:]}"
            kept.append({"title": title, "plot": plots.bars(title, some, "share of the Doc2Vec neighbors")})
    differences = {}
    if len(measured) == 2 and all(measured):
        queries = [read_queries(encoder.run) for encoder in compared.encoders]
        if queries[0]["pair"].equals(queries[1]["pair"]):
            differences = {name: difference(queries[1], queries[0], name) for name in names}
    table = [
        {
            "name": name.replace("_", " "),
            "figures": [of_run and of_run.get(name) for of_run in measured],
            "difference": differences.get(name, ""),
        }
        for name in names
    ]
    return {"problems": problems, "recalls": recalls, "kept": kept, "table": table, "differences": bool(differences)}


def closest_of_pairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (n, K, D) embeddings of n pairs the two of each pair that are closest, (n, D); (n, D) as they are."""
    if x.ndim == 2:
        return x, y
    scores = np.einsum("nkd,njd->nkj", x, y).reshape(len(x), -1)
    first, second = np.divmod(scores.argmax(axis=1), y.shape[1])
    places = np.arange(len(x))
    return x[places, first], y[places, second]


def maps(compared: Compared) -> dict[str, Any]:
    """A t-SNE map of a sample of pairs in each run, coloured by category where there are some."""
    count = min(MAP_PAIRS, len(compared.images))
    drawn = np.sort(compared.rng().choice(compared.images, count, replace=False))
    categories = compared.data.categories[compared.rows[drawn]]
    frequent = [number for number, _ in Counter(categories[categories >= 0].tolist()).most_common(MAP_CATEGORIES)]
    numbers = {category: number for number, category in enumerate(frequent)}
    other = len(plots.CATEGORIES) - 1 if frequent else 0
    colours = np.array([numbers.get(category, other) for category in categories.tolist()])
    legend = [(number, compared.data.category_names[category]) for category, number in numbers.items()]
    if frequent and (colours == other).any():
        legend.append((other, "other, or none"))
    drawings = []
    for letter, (x, y) in zip(LETTERS, compared.embeddings, strict=False):
        images, texts = closest_of_pairs(x[drawn], y[drawn])
        perplexity = min(30, (2 * count - 1) / 3)
        tsne = TSNE(init="pca", perplexity=perplexity, random_state=compared.settings.seed, n_jobs=1)
        points = tsne.fit_transform(np.concatenate([images, texts]).astype(np.float32))
        title = f"Map of the joint space of run {letter}"
        drawings.append(plots.scatter(title, points[:count], points[count:], colours))
    return {"count": count, "legend": legend, "plots": drawings}


def how_made(compared: Compared) -> dict[str, Any]:
    """Settings that differ and all of them, the dataset by split, what was rejected, and versions."""
    trees = []
    for encoder in compared.encoders:
        settings, weights = read_run(encoder.run)
        trees.append(weights_of(weights) | flatten(settings))
    settings = [(name, [str(tree[name]) for tree in trees]) for name in trees[0]]
    work = compared.settings.work_folder
    prepared = read_json(work / "prepare_dataset.json")["figures"] if (work / "prepare_dataset.json").is_file() else {}
    table = read_pairs(work, ["split"])
    counts = Counter(table["split"].to_pylist())
    splits = [(split, counts[split], len(compared.data.rows[split])) for split in SPLITS]
    runs = [read_json(encoder.run / "run.json") for encoder in compared.encoders]
    libraries = dict.fromkeys(name for run in runs for name in run["versions"])
    versions = [(name, [run["versions"].get(name, "") for run in runs]) for name in libraries]
    return {
        "settings": settings,
        "differing": [(name, values) for name, values in settings if len(set(values)) > 1],
        "splits": splits,
        "rejected": list(prepared.get("rejected", {}).items()),
        "published": prepared.get("published"),
        "images": prepared.get("images"),
        "runs": runs,
        "versions": versions,
    }


def weights_of(weights: Weights) -> dict[str, float]:
    """The loss weights by the names that they have among the settings of the report."""
    return {f"weight {name}": value for name, value in dataclasses.asdict(weights).items()}


def render(compared: Compared, sections: dict[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = [
        {"letter": letter, "name": encoder.run.name, **dataclasses.asdict(read_run(encoder.run)[1])}
        for letter, encoder in zip(LETTERS, compared.encoders, strict=False)
    ]
    dataset = compared.settings.dataset
    return environment.get_template("report.html").render(
        runs=runs,
        dataset=dataset.name or dataset.source,
        language=dataset.language,
        split=compared.split,
        pairs=len(compared.rows),
        images=len(compared.images),
        **sections,
    )
