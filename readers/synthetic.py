"""A made-up dataset of pictures and texts that illustrate one topic and seldom show or name the same things.

It follows the paper's description of such data (Sec. 1):

- The texts of a topic share words.
- The pictures of a topic differ: a gavel and a crowd both illustrate an article on abortion.
- One kind of picture serves several topics: the gavel illustrates immigration too.

`literalness` is the probability that a text names what is drawn: 1 gives captions. Nothing in the data is tuned to a
method. With it every step runs in seconds, without a download.
"""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.progress import ProgressBar
from pipeline.schema import Dataset, Synthetic
from readers.manifest import images_named, read_manifest
from readers.published import Published
from readers.whole_folder import remove_leftovers, written_whole_folder

SIZE = 64  # pixels
VERSION = 1  # raise it when the same settings give other pictures or texts: old ones are then drawn anew
TOPIC_WORDS = 40
COMMON_WORDS = 300
SENTENCES, WORDS = 2, 9  # of a text, and of each of its sentences
TOPIC_SHARE = 0.5  # of a text's words, the others are common to all topics

COLOURS = {
    "crimson": (214, 40, 57),
    "orange": (243, 139, 38),
    "golden": (226, 192, 34),
    "green": (58, 158, 74),
    "turquoise": (38, 166, 168),
    "blue": (45, 98, 201),
    "violet": (130, 66, 173),
    "black": (34, 34, 40),
}
POINTS, WAISTS, STYLES = (3, 4, 5, 6, 8), (0.75, 0.5, 0.3), ("filled", "outline", "rings", "halves")


def draw(settings: Synthetic, seed: int, folder: Path) -> Path:
    """Draw the dataset into `folder`, unless it lies there already. Returns its manifest, `folder`/pairs.jsonl.

    The manifest has columns image, text and category, `folder`/images the PNG files. The same settings and seed give
    the same bytes. The folder appears whole or not at all. Raises UserError where it holds anything else.
    """
    manifest, stamp = folder / "pairs.jsonl", folder / "synthetic.json"
    made = {"version": VERSION, "seed": seed, **settings.model_dump()}
    remove_leftovers(folder)
    if folder.exists() and not stamp.is_file():
        raise UserError(f"{folder} was not made by this program; move it away")
    if _is_drawn(manifest, stamp, made, settings.pairs):
        return manifest
    try:
        with written_whole_folder(folder) as new:
            (new / "images").mkdir()
            world = World(settings, random.Random(f"synthetic {seed}"))
            with (new / manifest.name).open("w", encoding="utf-8") as file:
                for number in ProgressBar(range(settings.pairs), desc="drawing", unit="image"):
                    image, text, topic = world.pair()
                    name = f"images/{number:06}.png"
                    image.save(new / name)
                    file.write(json.dumps({"image": name, "text": text, "category": topic}, ensure_ascii=False) + "\n")
            write_json(new / stamp.name, made)
    except OSError as error:
        raise UserError(f"cannot draw into {folder}: {error}") from None
    return manifest


def _is_drawn(manifest: Path, stamp: Path, made: dict[str, Any], pairs: int) -> bool:
    """Whether the dataset that `made` describes lies there, as far as can be seen without reading it."""
    try:
        is_same = read_json(stamp) == made
    except UserError:
        return False
    return is_same and manifest.is_file() and len(list((manifest.parent / "images").glob("[0-9]*.png"))) == pairs


class World:
    """Topics, motifs and words, and the pairs drawn from them. All that is random comes from `chance`, in order."""

    def __init__(self, settings: Synthetic, chance: random.Random):
        self.settings, self.chance = settings, chance
        count = settings.topics * (1 + TOPIC_WORDS) + settings.motifs + COMMON_WORDS
        words = iter(_words(count, chance))
        self.topics = list(itertools.islice(words, settings.topics))
        self.topic_words = [list(itertools.islice(words, TOPIC_WORDS)) for _ in self.topics]
        self.motif_words = list(itertools.islice(words, settings.motifs))
        self.common_words = list(words)
        # Motifs are dealt out like cards: a topic gets different ones, and each serves about as many topics.
        pack: list[int] = []
        self.motifs_of: list[list[int]] = []
        for _ in self.topics:
            hand: list[int] = []
            while len(hand) < settings.motifs_per_topic:
                if not set(pack) - set(hand):
                    pack += chance.sample(range(settings.motifs), settings.motifs)
                card = next(motif for motif in pack if motif not in hand)
                pack.remove(card)
                hand.append(card)
            self.motifs_of.append(hand)
        shapes = list(itertools.product(POINTS, WAISTS, STYLES))
        chance.shuffle(shapes)
        self.shapes = [shapes[motif % len(shapes)] for motif in range(settings.motifs)]

    def pair(self) -> tuple[Image.Image, str, str]:
        """A picture, its text, and their topic."""
        topic, motif, colour = self._subject()
        return self._picture(motif, colour), self._text(topic, motif, colour), self.topics[topic]

    def captioned(self, count: int) -> tuple[Image.Image, list[str]]:
        """A picture and `count` texts that illustrate its topic."""
        topic, motif, colour = self._subject()
        return self._picture(motif, colour), [self._text(topic, motif, colour) for _ in range(count)]

    def _subject(self) -> tuple[int, int, str]:
        """A topic, one of its motifs, and a colour."""
        topic = self.chance.randrange(len(self.topics))
        return topic, self.chance.choice(self.motifs_of[topic]), self.chance.choice(list(COLOURS))

    def _text(self, topic: int, motif: int, colour: str) -> str:
        def word() -> str:
            """A word of the topic or a common one. The r-th of a list comes 1/r as often as the first (Zipf)."""
            words = self.topic_words[topic] if self.chance.random() < TOPIC_SHARE else self.common_words
            return words[int((len(words) + 1) ** self.chance.random()) - 1]

        sentences = [[word() for _ in range(WORDS)] for _ in range(SENTENCES)]
        if self.chance.random() < self.settings.literalness:
            sentence = self.chance.choice(sentences)
            place = self.chance.randrange(WORDS - 1)
            sentence[place : place + 2] = [colour, self.motif_words[motif]]
        return " ".join(" ".join(words).capitalize() + "." for words in sentences)

    def _picture(self, motif: int, colour: str) -> Image.Image:
        """The motif on a pale ground, anywhere, turned and sized at random."""
        points, waist, style = self.shapes[motif]
        chance, ink = self.chance, COLOURS[colour]
        ground = tuple(chance.randrange(205, 256) for _ in range(3))
        big = 2 * SIZE  # drawn at twice the size and shrunk, for smooth edges
        image = Image.new("RGB", (big, big), ground)
        pen = ImageDraw.Draw(image)
        radius = big * chance.uniform(0.24, 0.4)
        centre = [chance.uniform(radius, big - radius) for _ in range(2)]
        turn = chance.uniform(0, 2 * math.pi)

        def star(scale: float) -> list[tuple[float, float]]:
            corners = []
            for corner in range(2 * points):
                angle = turn + math.pi * corner / points
                reach = radius * scale * (1 if corner % 2 == 0 else waist)
                corners.append((centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle)))
            return corners

        if style == "outline":
            pen.line([*star(1), *star(1)[:2]], fill=ink, width=8, joint="curve")
        else:
            pen.polygon(star(1), fill=ink)
        if style == "rings":
            pen.polygon(star(0.7), fill=ground)
            pen.polygon(star(0.4), fill=ink)
        if style == "halves":
            pen.polygon(star(1)[: points + 1], fill=tuple((value + 255) // 2 for value in ink))
        return image.reduce(2)


def _words(count: int, chance: random.Random) -> list[str]:
    """Different pronounceable words of no language, of two or three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = (chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(chance.choice((2, 3))))
        words["".join(syllables) + chance.choice(("", "n", "r", "s", "l"))] = None
    return list(words)


def made_up(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """The made-up dataset, drawn into `published_folder` where it does not lie there already."""
    path = draw(dataset.synthetic, seed, published_folder / "synthetic")
    return Published(path.parent, lambda: read_manifest(path, path.parent), (path,), lambda: images_named(path))
