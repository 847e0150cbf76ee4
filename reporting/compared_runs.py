"""One run or two, and the embeddings of their test pairs: what the sections of the report read."""

import base64
import functools
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from datasets import Prepared
from images.files import UnreadableImage, load_thumbnail
from metrics import Metric
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.pairs import read_pairs
from pipeline.work import Work
from reporting.figures import Figure, read_figures, read_metrics
from text_space.tokenizer import RULED, UNSEGMENTED
from training.encoder import RunEncoder, demand_work
from training.expansion import embed_split
from training.text_streams import load_pairs

THUMBNAIL_SIDE = 176
"""Pixels of the longer side of an image."""
TEXT_CHARACTERS = 260
"""Characters of a text, at most."""


class ComparedRuns:
    """One run, or a method and its baseline, and the embeddings of the R pairs of the evaluated split.

    The report calls the first run A and the second B. Raises UserError where the two runs have other pairs.
    """

    def __init__(self, encoders: Sequence[RunEncoder]) -> None:
        self.encoders = encoders
        for encoder in encoders:
            demand_work(encoder.run, encoder.settings)
        for encoder in encoders:  # the report is about what was evaluated, whatever the run's settings say
            if (encoder.run / "metrics.json").is_file():
                evaluation, measured = encoder.settings.evaluation, read_json(encoder.run / "metrics.json")
                evaluation.split, evaluation.expand = measured["split"], measured.get("expand", 0.0)
                evaluation.expand_neighbors = measured.get("expand_neighbors", evaluation.expand_neighbors)
        self.letters = "AB"[: len(encoders)]
        self.settings = encoders[0].settings
        self.work = Work(self.settings.work_folder)
        self.split = self.settings.evaluation.split
        prepared = [
            load_pairs(one.work_folder, one.features_folder, one.model.text, encoder.device)
            for encoder in encoders
            for one in [encoder.settings]
        ]
        self.data: Prepared = prepared[0]
        self.rows = self.data.rows[self.split]
        """(R,) int64, the pairs."""
        for encoder, data in zip(encoders[1:], prepared[1:], strict=True):
            self._demand_same_pairs(encoder, data)
        self.embeddings = [_embed(encoder, data) for encoder, data in zip(encoders, prepared, strict=True)]
        """Of each run, images and texts: (R, D) or (R, K, D) unit vectors."""
        table = read_pairs(self.settings.work_folder, ["text", "image_path"]).take(self.rows)
        self.texts: list[str] = table["text"].to_pylist()
        self.paths = [self.data.images.root / path for path in table["image_path"].to_pylist()]
        self.groups = self.data.image_ids[self.rows]
        """(R,) image numbers."""
        self.images = np.sort(np.unique(self.groups, return_index=True)[1])
        """Positions of the first pair of each image, ascending."""

    def _demand_same_pairs(self, other: RunEncoder, data: Prepared) -> None:
        first = self.encoders[0].run
        pairs = [read_json(run / "inputs.json")["pairs.parquet"] for run in (first, other.run)]
        if pairs[0] != pairs[1]:
            raise UserError(
                f"{other.run} and {first} were trained on different pairs.parquet and cannot be compared; "
                "name two runs of one WORK"
            )
        if other.settings.evaluation.split != self.split or not np.array_equal(data.rows[self.split], self.rows):
            raise UserError(
                f"{other.run} and {first} cannot use the same pairs (other known words, or evaluated on "
                "another split); name two runs of one WORK, evaluated alike"
            )

    @functools.cached_property
    def figures(self) -> tuple[list[dict[str, Figure] | None], list[str]]:
        """What evaluate.py measured in each run, None where it is not evaluated, and the reasons for that."""
        measured: list[dict[str, Figure] | None] = []
        problems = []
        for encoder in self.encoders:
            try:
                measured.append(read_figures(encoder.run))
            except UserError as error:
                measured.append(None)
                problems.append(str(error))
        return measured, problems

    @functools.cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of all evaluated runs, by name."""
        measured = self.figures[0]
        runs = [encoder.run for encoder, figures in zip(self.encoders, measured, strict=True) if figures]
        return {name: metric for run in runs for name, metric in read_metrics(run).items()}

    @functools.cached_property
    def words(self) -> list[set[str]]:
        """The words of each text, as the first run's tokenizer reads them."""
        return [set(self.encoders[0].tokenizer.words(text)) for text in self.texts]

    def rng(self) -> np.random.Generator:
        """A new generator with the first run's seed."""
        return np.random.default_rng(self.settings.seed)

    def positions_of(self, pairs: Sequence[int] | None, count: int) -> list[int]:
        """Positions of `pairs`; None: of `count` drawn images. Raises UserError for pairs outside the split."""
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

    @functools.cache  # noqa: B019 - a report has one object
    def thumbnail(self, position: int) -> str | None:
        """The pair's image as a data URI; None where it can no longer be read."""
        try:
            image = load_thumbnail(self.paths[position], THUMBNAIL_SIDE, self.settings.dataset.max_pixels)
        except UnreadableImage:
            return None
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=72, method=4)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

    def item(self, position: int, words: Iterable[str] = ()) -> dict[str, Any]:
        """A pair for the template: number, thumbnail, text, and the text in parts with `words` marked."""
        text = " ".join(self.texts[position].split())
        shown = text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS].rstrip() + "…"
        tokenizer = self.encoders[0].tokenizer
        parts = mark_words(shown, set(words) & set(tokenizer.words(self.texts[position])), tokenizer.language)
        return {"pair": int(self.rows[position]), "image": self.thumbnail(position), "text": shown, "parts": parts}


def _embed(encoder: RunEncoder, data: Prepared) -> tuple[np.ndarray, np.ndarray]:
    x, y = embed_split(encoder.model, data, encoder.settings, encoder.device)
    return x.float().cpu().numpy(), y.float().cpu().numpy()


def mark_words(text: str, words: Iterable[str], language: str) -> list[tuple[str, bool]]:
    """`text` in parts, and for each whether it is one of `words`. Only whole words match where blanks divide words."""
    longest_first = "|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word))))
    if not longest_first:
        return [(text, False)]
    has_no_blanks = language in (*RULED, *UNSEGMENTED)
    pattern = f"({longest_first})" if has_no_blanks else rf"(?<!\w)({longest_first})(?!\w)"
    parts = re.split(pattern, text, flags=re.IGNORECASE)
    return [(part, number % 2 == 1) for number, part in enumerate(parts) if part]
