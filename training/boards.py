"""What TensorBoard shows of a run beside curves: results of fixed val queries, distances, HParams, the projector.

Nothing here draws from torch's or numpy's global generators or depends on an earlier epoch, so that a run's weights are
the same without it, and a resumed run's pages are those of one that was never stopped.
"""

import bisect
import functools
import html
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from datasets import Prepared
from images.files import UnreadableImage, load_thumbnail
from metrics import registered
from pipeline.files import read_array
from pipeline.pairs import read_pairs
from pipeline.settings import Settings, flatten
from ranking import nearest, rank_of_own
from training.runs import OF_A_RUN

QUERIES, RESULTS = 4, 5
SAMPLE = 1000
"""Val pairs, at most, whose distances are shown."""
NEIGHBOR_SHARE = 0.01
"""Of these pairs, the share that counts as a text's Doc2Vec neighbors (one at least), as in evaluate.py."""

THUMBNAIL, MARGIN, LINE = 112, 8, 19  # pixels of a panel
SPRITE = 48  # pixels of an image in the projector
TRUE, FRAME, INK, FAINT = "#1a9850", "#c8ccd2", "#1b1e23", "#6b727d"


def show_validation(
    board: SummaryWriter,
    data: Prepared,
    rows: np.ndarray,
    x: Tensor,
    y: Tensor,
    settings: Settings,
    epoch: int,
    step: int,
) -> None:
    """Histograms of distances in the joint space and, every `training.show_results_every` epochs, panels of results.

    rows: (R,) val pairs, always in the same order; x, y: (R, D) or (R, K, D), embeddings of their images and texts.
    """
    every = settings.training.show_results_every
    if not every:
        return
    for name, values in distances(data, rows, x, y, settings).items():
        board.add_histogram(f"distances/{name}", values, step)
    if epoch % every:
        return
    found = results(data, rows, x, y)
    named = {query for of_way in found.values() for query in of_way}
    texts = _texts(settings, rows, named | {one.position for some in found["image_to_text"].values() for one in some})
    images_found = draw_images(data, rows, found["text_to_image"], texts, settings)
    texts_found = draw_texts(data, rows, found["image_to_text"], texts, settings)
    board.add_image("results/text_to_image", np.asarray(images_found), step, dataformats="HWC")
    board.add_image("results/image_to_text", np.asarray(texts_found), step, dataformats="HWC")
    board.add_text("results/image_to_text", as_markdown(rows, found["image_to_text"], texts), step)


# Distances


def distances(data: Prepared, rows: np.ndarray, x: Tensor, y: Tensor, settings: Settings) -> dict[str, np.ndarray]:
    """Euclidean distances, from 0 to 2, over the first SAMPLE of the pairs, by name.

    `pairs`: image to its text, and `unrelated_pairs`: to the text of another image. `neighbor_images` and
    `neighbor_texts`: of every pair to those of its nearest neighbors in Doc2Vec space among these pairs.
    """
    count = min(len(rows), SAMPLE)
    rows, x, y = rows[:count], x[:count].cpu(), y[:count].cpu()
    ids = data.image_ids[rows]
    found = {"pairs": _distances(x, y)}
    turned = np.roll(np.arange(count), 1)
    others = ids != ids[turned]
    found["unrelated_pairs"] = _distances(x, y[torch.from_numpy(turned)])[others]

    reference = torch.from_numpy(np.array(read_array(settings.work_folder / "doc2vec" / "vectors.npy")[rows]))
    apart = torch.cdist(reference, reference)
    apart[torch.from_numpy(ids[:, None] == ids)] = torch.inf
    near = apart.topk(min(max(round(NEIGHBOR_SHARE * count), 1), count), largest=False)
    first, place = torch.nonzero(near.values.isfinite(), as_tuple=True)
    second = near.indices[first, place]
    for name, vectors in (("neighbor_images", x), ("neighbor_texts", y)):
        found[name] = _distances(vectors[first], vectors[second])
    return {name: values for name, values in found.items() if len(values)}


def _distances(x: Tensor, y: Tensor) -> np.ndarray:
    """(n,) distances of unit vectors (n, D), or of the closest of (n, K, D)."""
    x, y = (vectors if vectors.dim() == 3 else vectors[:, None] for vectors in (x.float(), y.float()))
    cosines = (x @ y.transpose(1, 2)).flatten(1).amax(dim=1)
    return (2 - 2 * cosines).clamp(min=0).sqrt().numpy()


# Results


@dataclass(frozen=True)
class Found:
    """One result of a query."""

    rank: int
    """From 1."""
    position: int
    """In the `rows` that were searched."""
    score: float
    """Cosine similarity to the query."""
    is_own: bool
    """Whether it is of the query's image."""


def results(data: Prepared, rows: np.ndarray, x: Tensor, y: Tensor) -> dict[str, dict[int, list[Found]]]:
    """What the first few pairs' texts find among the images and their images among the texts, by way and by the query's
    position in `rows`: the first RESULTS and, where it is not among them, the best-ranked own one."""
    ids = data.image_ids[rows]
    images = _images_once(data, rows)
    x_once, y_all, x_all = x.cpu().numpy()[images], y.cpu().numpy(), x.cpu().numpy()
    ways = {"text_to_image": (y_all, x_once, images), "image_to_text": (x_all, y_all, np.arange(len(rows)))}
    found: dict[str, dict[int, list[Found]]] = {}
    for way, (queries, targets, positions) in ways.items():
        found[way] = {}
        for query in images[:QUERIES].tolist():
            own = ids[positions] == ids[query]
            first = nearest(targets, queries[query], RESULTS, own=own)
            ranked = [(rank, place, score) for rank, (place, score) in enumerate(first, start=1)]
            if not any(own[place] for _, place, _ in ranked):
                ((place, score),) = nearest(targets, queries[query], 1, own)
                ranked.append((rank_of_own(targets, queries[query], own), place, score))
            found[way][query] = [
                Found(rank, int(positions[place]), score, bool(own[place])) for rank, place, score in ranked
            ]
    return found


def _images_once(data: Prepared, rows: np.ndarray) -> np.ndarray:
    """Positions in `rows` of the first pair of each image, ascending."""
    return np.sort(np.unique(data.image_ids[rows], return_index=True)[1])


def _texts(settings: Settings, rows: np.ndarray, positions: Iterable[int]) -> dict[int, str]:
    """The texts of the pairs at some positions in `rows`, each in one line."""
    wanted = sorted(set(positions))
    column = read_pairs(settings.work_folder, ["text"])["text"].take(rows[wanted])
    return {position: " ".join(text.split()) for position, text in zip(wanted, column.to_pylist(), strict=True)}


def as_markdown(rows: np.ndarray, of_images: Mapping[int, Sequence[Found]], texts: Mapping[int, str]) -> str:
    """Texts that images found, for TensorBoard's page of texts: in any script, and whole."""
    lines = ["| image of pair | rank | cosine similarity | text |", "| ---: | ---: | ---: | --- |"]
    for query, found in of_images.items():
        for one in found:
            mark = "**" if one.is_own else ""
            text = html.escape(texts[one.position][:500])
            text = text.translate({ord(character): f"&#{ord(character)};" for character in "|*_`[]#\\~"})
            lines.append(f"| {rows[query]} | {one.rank} | {one.score:.3f} | {mark}{text}{mark} |")
    return "\n".join(lines)


# Drawing


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of the system with many scripts, or the one that comes with Pillow."""
    for name in ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf"):
        try:
            return ImageFont.truetype(name, 12)
        except OSError:
            continue
    return ImageFont.load_default(12)


@functools.lru_cache(maxsize=10_000)
def _has(character: str) -> bool:
    """Whether the font has the character."""
    return bytes(_font().getmask(character)) != bytes(_font().getmask("\U0010fffe"))


def _drawable(text: str) -> str:
    """`text`, or a pointer to where it can be read if the font lacks some of its characters."""
    lacking = {character for character in text if not character.isspace() and not _has(character)}
    return "(no font for its script: see the page Text)" if len(lacking) > len(set(text)) / 4 else text


def _fitted(text: str, width: int) -> str:
    """The beginning of `text` that is at most `width` pixels wide."""
    font, text = _font(), _drawable(text[:300])
    if font.getlength(text) <= width:
        return text
    longest = bisect.bisect_right(range(len(text)), width, key=lambda end: font.getlength(text[:end] + "…")) - 1
    return text[: max(longest, 0)] + "…"


def _thumbnail(data: Prepared, pair: int, settings: Settings, size: int = THUMBNAIL) -> Image.Image:
    """The pair's image in the middle of a white square; a grey one where it cannot be read."""
    path = data.images.root / data.images.paths[data.images.of_pair[pair]]
    return _tile(path, size, settings.dataset.max_pixels)


@functools.lru_cache(maxsize=256)  # the same images are found in one epoch after the other
def _tile(path: Path, size: int, max_pixels: int) -> Image.Image:
    tile = Image.new("RGB", (size, size), "white")
    try:
        image = load_thumbnail(path, size, max_pixels)
    except UnreadableImage:
        return Image.new("RGB", (size, size), FRAME)
    tile.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return tile


WIDTH = (RESULTS + 1) * (THUMBNAIL + MARGIN) + MARGIN


def draw_images(
    data: Prepared,
    rows: np.ndarray,
    of_texts: Mapping[int, Sequence[Found]],
    texts: Mapping[int, str],
    settings: Settings,
) -> Image.Image:
    """A row for every text, with the images that it found, its own in green."""
    height = LINE + THUMBNAIL + LINE + 3 * MARGIN
    panel = Image.new("RGB", (WIDTH, height * len(of_texts)), "white")
    pen = ImageDraw.Draw(panel)
    for number, (query, found) in enumerate(of_texts.items()):
        top = number * height + MARGIN
        pen.text((MARGIN, top), _fitted(f"{rows[query]}: {texts[query]}", WIDTH - 2 * MARGIN), INK, _font())
        for column, one in enumerate(found):
            left, below = MARGIN + column * (THUMBNAIL + MARGIN), top + LINE
            panel.paste(_thumbnail(data, rows[one.position], settings), (left, below))
            colour, width = (TRUE, 4) if one.is_own else (FRAME, 1)
            pen.rectangle((left, below, left + THUMBNAIL - 1, below + THUMBNAIL - 1), outline=colour, width=width)
            caption = f"{one.rank}. {rows[one.position]}: {one.score:.3f}"
            pen.text((left, below + THUMBNAIL + 2), caption, TRUE if one.is_own else FAINT, _font())
    return panel


def draw_texts(
    data: Prepared,
    rows: np.ndarray,
    of_images: Mapping[int, Sequence[Found]],
    texts: Mapping[int, str],
    settings: Settings,
) -> Image.Image:
    """A row for every image, with the texts that it found, its own in green."""
    height = LINE + THUMBNAIL + 2 * MARGIN
    panel = Image.new("RGB", (WIDTH, height * len(of_images)), "white")
    pen = ImageDraw.Draw(panel)
    for number, (query, found) in enumerate(of_images.items()):
        top, left = number * height + MARGIN, THUMBNAIL + 2 * MARGIN
        pen.text((MARGIN, top), f"image of pair {rows[query]}", FAINT, _font())
        panel.paste(_thumbnail(data, rows[query], settings), (MARGIN, top + LINE))
        for line, one in enumerate(found):
            shown = _fitted(f"{one.rank}. {one.score:.3f}  {texts[one.position]}", WIDTH - left - MARGIN)
            pen.text((left, top + LINE + line * (LINE + 2)), shown, TRUE if one.is_own else INK, _font())
    return panel


# HParams and projector


def write_hparams(run: Path, weights: Any, settings: Settings, figures: Mapping[str, float], step: int) -> None:
    """A finished run's settings and final figures for TensorBoard's HParams, in place of what was there.

    weights: the loss weights, a dataclass. The figures of evaluate.py stand beside these as soon as there are some.
    """
    suffix = ".hparams"
    for old in run.glob(f"events.out.tfevents.*{suffix}"):
        old.unlink()
    shaping: dict[str, Any] = {f"weights.{name}": value for name, value in asdict(weights).items()}
    for name, value in flatten(settings).items():
        if name in OF_A_RUN and value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            shaping[name] = value if is_number else str(value)
    own = {f"hparam/{name}": value for name, value in figures.items()}
    split = settings.evaluation.split
    later = [f"{split}/{name}" for name, metric in registered(settings.evaluation).items() if metric.every_epoch]
    with SummaryWriter(str(run), filename_suffix=suffix) as board:
        for summary in hparams(shaping, dict.fromkeys([*own, *later], 0.0)):
            board.file_writer.add_summary(summary, step)
        for name, value in own.items():
            board.add_scalar(name, value, step)


def write_projector(
    run: Path, data: Prepared, rows: np.ndarray, x: Tensor, y: Tensor, settings: Settings, epoch: int
) -> None:
    """`evaluation.projector_pairs` of the pairs `rows`, drawn by seed, for TensorBoard's projector.

    Every image is a point with its picture, every text a point with a faded one; of PVSE every embedding is a point.
    x, y: (R, D) or (R, K, D), embeddings of their images and texts. What an earlier call wrote is replaced.
    """
    (run / "projector_config.pbtxt").unlink(missing_ok=True)
    tag = "embeddings"
    for old in run.glob(f"*/{tag}"):
        shutil.rmtree(old.parent)
    count = min(settings.evaluation.projector_pairs, len(rows))
    if not count:
        return
    drawn = np.sort(np.random.default_rng(settings.seed).choice(len(rows), size=count, replace=False))
    images = drawn[_images_once(data, rows[drawn])]
    texts = _texts(settings, rows, drawn.tolist())
    vectors, labels, pictures = [], [], []
    for kind, embeddings, places in (("image", x, images), ("text", y, drawn)):
        for place in places:
            own = embeddings[int(place)].detach().float().cpu().numpy().reshape(-1, embeddings.shape[-1])
            picture = _thumbnail(data, rows[place], settings, SPRITE)
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
