"""TensorBoard pages of a run beside its curves: results of fixed val queries, distances, HParams, the projector.

Nothing here draws from the global random generators or depends on an earlier epoch. A run's weights are therefore the
same without these pages, and a resumed run has the same pages as one that was never stopped.
"""

import functools
import html
import importlib.util
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from datasets import Prepared
from images.files import UnreadableImage, load_thumbnail
from metrics import registered
from pipeline.files import read_array
from pipeline.pairs import read_pairs
from pipeline.progress import ProgressBar
from pipeline.schema import Settings
from pipeline.settings import flatten
from pipeline.work import Work
from ranking import nearest, rank_of_own
from training.proximity import doc2vec_neighbors, pair_distances
from training.runs import OF_A_RUN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUERIES, RESULTS = 4, 5
NEIGHBOR_SHARE = 0.01
"""Share of the texts that counts as a text's Doc2Vec neighbors, at least one, as in evaluate.py."""
DISTANCE_SAMPLE = 1000
"""Val pairs, at most, whose distances are shown."""
PANEL_IMAGE_SIDE, PROJECTOR_IMAGE_SIDE = 112, 48
"""Pixels of the longer side of an image."""
PANEL_CHARACTERS = 120
"""Characters of a text in a panel. The page Text has more of it."""
MARGINS = {"left": 0.01, "right": 0.99, "wspace": 0.05}
"""Of a panel. A layout engine would take as long as drawing does."""
OWN_COLOUR, OTHER_COLOUR, TEXT_COLOUR = "#1a9850", "#c8ccd2", "#1b1e23"


def show_validation(
    board: SummaryWriter,
    rows: np.ndarray,
    x: Tensor,
    y: Tensor,
    *,
    data: Prepared,
    work: Path,
    every: int,
    max_pixels: int,
    epoch: int,
    step: int,
) -> None:
    """Histograms of distances in the joint space and, every `every` epochs, panels of results. 0 shows neither.

    rows: (R,) val pairs, in the same order at every call. x, y: (R, D) or (R, K, D), embeddings of images and texts.
    """
    if not every:
        return
    images, texts = x.float().cpu().numpy(), y.float().cpu().numpy()
    vectors = read_array(Work(work).vectors)[rows[:DISTANCE_SAMPLE]]
    for name, values in distances(data.image_ids[rows], images, texts, vectors).items():
        board.add_histogram(f"distances/{name}", values, step)
    if epoch % every:
        return
    found = results(data.image_ids[rows], images, texts)
    shown = {query for of_way in found.values() for query in of_way}
    shown |= {result.position for of_query in found["image_to_text"].values() for result in of_query}
    captions = read_texts(work, rows, shown)
    board.add_text("results/image_to_text", as_markdown(rows, found["image_to_text"], captions), step)
    if not _has_matplotlib():
        return
    pictures = functools.partial(square_thumbnail, data, max_pixels=max_pixels)
    with warnings.catch_warnings(action="ignore"):  # of characters that the font lacks: the page Text shows them
        board.add_figure("results/text_to_image", image_panel(rows, found["text_to_image"], captions, pictures), step)
        board.add_figure("results/image_to_text", text_panel(rows, found["image_to_text"], captions, pictures), step)


@functools.cache
def _has_matplotlib() -> bool:
    """Whether panels can be drawn. Says once where they cannot."""
    if importlib.util.find_spec("matplotlib"):
        return True
    ProgressBar.write("matplotlib is not installed: TensorBoard shows no panels of results")
    return False


# --- Distances -------------------------------------------------------------------------------------------------------


def distances(groups: np.ndarray, x: np.ndarray, y: np.ndarray, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Euclidean distances in the joint space, from 0 to 2, of the first S = len(vectors) pairs, by name.

    - `pairs`: an image and its text.
    - `unrelated_pairs`: an image and the text of another image.
    - `neighbor_images`, `neighbor_texts`: two pairs that are Doc2Vec neighbors.

    groups: (R,) image numbers. x, y: (R, D) or (R, K, D), images and texts. vectors: (S, d), Doc2Vec.
    """
    count = len(vectors)
    groups, x, y = groups[:count], x[:count], y[:count]
    previous = np.roll(np.arange(count), 1)
    unrelated = groups != groups[previous]
    first, second = doc2vec_neighbors(vectors, groups, np.arange(count), max(round(NEIGHBOR_SHARE * count), 1)).T
    found = {
        "pairs": pair_distances(x, y),
        "unrelated_pairs": pair_distances(x[unrelated], y[previous][unrelated]),
        "neighbor_images": pair_distances(x[first], x[second]),
        "neighbor_texts": pair_distances(y[first], y[second]),
    }
    return {name: values for name, values in found.items() if len(values)}


# --- Results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One result of a query."""

    rank: int
    """From 1."""
    position: int
    """In the rows that were searched."""
    score: float
    """Cosine similarity to the query."""
    is_own: bool
    """Whether it is of the query's image."""


Results = Mapping[int, Sequence[Result]]
"""By position of the query, the nearest first."""


def results(groups: np.ndarray, x: np.ndarray, y: np.ndarray) -> dict[str, dict[int, list[Result]]]:
    """Results of the first QUERIES images and of their texts, by way and by the query's position.

    A query has the RESULTS nearest items, and its best-ranked own item where that is not among them.

    groups: (R,) image numbers. x, y: (R, D) or (R, K, D), images and texts.
    """
    images = first_of_each_image(groups)
    ways = {"text_to_image": (y, x[images], images), "image_to_text": (x, y, np.arange(len(groups)))}
    return {
        way: {
            query: _results_of_query(queries[query], targets, positions, groups[positions] == groups[query])
            for query in images[:QUERIES].tolist()
        }
        for way, (queries, targets, positions) in ways.items()
    }


def _results_of_query(query: np.ndarray, targets: np.ndarray, positions: np.ndarray, own: np.ndarray) -> list[Result]:
    ranked = [(rank, *found) for rank, found in enumerate(nearest(targets, query, RESULTS, own=own), start=1)]
    if not any(own[place] for _, place, _ in ranked):
        ranked.append((rank_of_own(targets, query, own), *nearest(targets, query, 1, own)[0]))
    return [Result(rank, int(positions[place]), score, bool(own[place])) for rank, place, score in ranked]


def first_of_each_image(groups: np.ndarray) -> np.ndarray:
    """Positions of the first pair of each image, ascending. groups: (R,) image numbers."""
    return np.sort(np.unique(groups, return_index=True)[1])


def read_texts(work: Path, rows: np.ndarray, positions: Iterable[int]) -> dict[int, str]:
    """The texts of pairs, each in one line, by position in `rows`."""
    wanted = sorted(set(positions))
    column = read_pairs(work, ["text"])["text"].take(rows[wanted])
    return {position: " ".join(text.split()) for position, text in zip(wanted, column.to_pylist(), strict=True)}


def as_markdown(rows: np.ndarray, of_images: Results, texts: Mapping[int, str]) -> str:
    """Texts found by images, as a table for the page Text: in any script, and nearly whole."""
    lines = ["| image of pair | rank | cosine similarity | text |", "| ---: | ---: | ---: | --- |"]
    for query, found in of_images.items():
        for result in found:
            mark = "**" if result.is_own else ""
            text = html.escape(texts[result.position][:500])
            text = text.translate({ord(character): f"&#{ord(character)};" for character in "|*_`[]#\\~"})
            lines.append(f"| {rows[query]} | {result.rank} | {result.score:.3f} | {mark}{text}{mark} |")
    return "\n".join(lines)


# --- Panels ----------------------------------------------------------------------------------------------------------


def image_panel(rows: np.ndarray, of_texts: Results, texts: Mapping[int, str], pictures: Any) -> "Figure":
    """A row for every text: the images it found, its own with a green frame. `pictures` gives a pair's image."""
    from matplotlib.figure import Figure

    figure = Figure((1.7 * (RESULTS + 1), 2.2 * len(of_texts)))
    bands = figure.subfigures(len(of_texts), squeeze=False)[:, 0]
    for band, (query, found) in zip(bands, of_texts.items(), strict=True):
        title = f"{rows[query]}: {texts[query][:PANEL_CHARACTERS]}"
        band.suptitle(title, x=0.01, ha="left", fontsize=9, color=TEXT_COLOUR, parse_math=False)
        cells = band.subplots(1, RESULTS + 1, gridspec_kw={**MARGINS, "bottom": 0.1, "top": 0.86})
        for cell in cells[len(found) :]:
            cell.set_axis_off()
        for cell, result in zip(cells, found, strict=False):
            colour = OWN_COLOUR if result.is_own else OTHER_COLOUR
            _show_picture(cell, pictures(rows[result.position]), colour, 4 if result.is_own else 1)
            cell.set_xlabel(f"{result.rank}. {rows[result.position]}: {result.score:.3f}", fontsize=8)
    return figure


def text_panel(rows: np.ndarray, of_images: Results, texts: Mapping[int, str], pictures: Any) -> "Figure":
    """A row for every image: the texts it found, its own in green. `pictures` gives a pair's image."""
    from matplotlib.figure import Figure

    figure = Figure((1.7 * (RESULTS + 1), 1.9 * len(of_images)))
    cells = figure.subplots(
        len(of_images),
        2,
        squeeze=False,
        gridspec_kw={**MARGINS, "bottom": 0.03, "top": 0.99, "width_ratios": (1, RESULTS)},
    )
    for (picture, lines), (query, found) in zip(cells, of_images.items(), strict=True):
        _show_picture(picture, pictures(rows[query]), OTHER_COLOUR, 1)
        picture.set_xlabel(f"image of pair {rows[query]}", fontsize=8)
        lines.set_axis_off()
        for number, result in enumerate(found):
            text = f"{result.rank}. {result.score:.3f}  {texts[result.position][:PANEL_CHARACTERS]}"
            colour = OWN_COLOUR if result.is_own else TEXT_COLOUR
            place = 1 - number / (RESULTS + 1)
            lines.text(0, place, text, color=colour, fontsize=9, va="top", clip_on=True, parse_math=False)
    return figure


def _show_picture(cell: "Axes", picture: Image.Image, frame: str, width: float) -> None:
    cell.imshow(np.asarray(picture))
    cell.set(xticks=[], yticks=[])
    for spine in cell.spines.values():
        spine.set(edgecolor=frame, linewidth=width)


def square_thumbnail(data: Prepared, pair: int, side: int = PANEL_IMAGE_SIDE, *, max_pixels: int) -> Image.Image:
    """A pair's image in the middle of a white square; a grey square where it cannot be read."""
    return _square(data.images.root / data.images.paths[data.images.of_pair[pair]], side, max_pixels)


@functools.lru_cache(maxsize=256)  # many epochs find the same images
def _square(path: Path, side: int, max_pixels: int) -> Image.Image:
    square = Image.new("RGB", (side, side), "white")
    try:
        image = load_thumbnail(path, side, max_pixels)
    except UnreadableImage:
        return Image.new("RGB", (side, side), OTHER_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# --- HParams and projector -------------------------------------------------------------------------------------------


def write_hparams(
    run: Path, weights: Any, settings: Settings, config_file: Settings, figures: Mapping[str, float], step: int
) -> None:
    """Write a finished run's settings and final figures for TensorBoard's HParams. Earlier ones are replaced.

    The first columns are the loss weights, a dataclass, then the settings that differ from the config file and the
    seed, then the others. The columns of evaluate.py's figures fill when that has run.
    """
    suffix = ".hparams"
    for old in run.glob(f"events.out.tfevents.*{suffix}"):
        old.unlink()
    columns: dict[str, Any] = {f"weights.{name}": value for name, value in asdict(weights).items()}
    of_file, of_run = flatten(config_file), flatten(settings)
    for name in sorted(of_run, key=lambda name: name != "seed" and of_run[name] == of_file[name]):
        value = of_run[name]
        if name in OF_A_RUN and value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            columns[name] = value if is_number else str(value)
    own = {f"hparam/{name}": value for name, value in figures.items()}
    split = settings.evaluation.split
    later = [f"{split}/{name}" for name, metric in registered(settings.evaluation).items() if metric.every_epoch]
    with SummaryWriter(str(run), filename_suffix=suffix) as board:
        for summary in hparams(columns, dict.fromkeys([*own, *later], 0.0)):
            board.file_writer.add_summary(summary, step)
        for name, value in own.items():
            board.add_scalar(name, value, step)


def write_projector(
    run: Path, data: Prepared, rows: np.ndarray, x: Tensor, y: Tensor, settings: Settings, epoch: int
) -> None:
    """Write `evaluation.projector_pairs` of the pairs `rows`, drawn by seed, for TensorBoard's projector.

    Every image is a point with its picture, every text a point with a faded picture. With PVSE every embedding is a
    point. Earlier points are replaced. x, y: (R, D) or (R, K, D), embeddings of images and texts.
    """
    (run / "projector_config.pbtxt").unlink(missing_ok=True)
    tag = "embeddings"
    for old in run.glob(f"[0-9]*/{tag}"):  # by epoch; an evaluation may have the tag's name
        shutil.rmtree(old.parent)
    count = min(settings.evaluation.projector_pairs, len(rows))
    if not count:
        return
    drawn = np.sort(np.random.default_rng(settings.seed).choice(len(rows), size=count, replace=False))
    images = drawn[first_of_each_image(data.image_ids[rows[drawn]])]
    texts = read_texts(settings.work_folder, rows, drawn.tolist())
    vectors, labels, pictures = [], [], []
    for kind, embeddings, places in (("image", x, images), ("text", y, drawn)):
        for place in places:
            own = embeddings[int(place)].detach().float().cpu().numpy().reshape(-1, embeddings.shape[-1])
            picture = square_thumbnail(data, rows[place], PROJECTOR_IMAGE_SIDE, max_pixels=settings.dataset.max_pixels)
            if kind == "text":
                picture = Image.blend(picture, Image.new("RGB", picture.size, "#c6dbf7"), 0.7)
            number = data.categories[rows[place]]
            category = data.category_names[number] if number >= 0 else ""
            vectors.append(own)
            labels += [[f"{kind} {rows[place]}", kind, str(rows[place]), category, texts[int(place)][:120]]] * len(own)
            pictures += [np.asarray(picture)] * len(own)
    with SummaryWriter(str(run), filename_suffix=".evaluation") as board:
        board.add_embedding(
            np.concatenate(vectors),
            metadata=labels,
            label_img=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255,
            global_step=epoch,
            tag=tag,
            metadata_header=["label", "kind", "pair", "category", "text"],
        )
