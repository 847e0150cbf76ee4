"""Answers of search.py: the items of an index that are nearest to a text, an image file or an indexed image.

Also what its page opens with: drawn pairs and common words.
"""

import difflib
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.pairs import SPLITS
from reporting.retrieval_index import Index
from text_space.tokenizer import SPECIAL_WORDS
from training.encoder import RunEncoder

MAX_EXPLAINED_WORDS = 5
"""Unknown words of a query for which similar words are searched. In a large vocabulary one takes half a second."""
TEXT_WIDTH = 48
"""Columns of the text in a table."""


class UnknownWords(UserError):
    """A query none of whose words is in the vocabulary."""

    def __init__(self, near: Mapping[str, list[str]], vocabulary: int) -> None:
        """near: unknown words with similar known ones. vocabulary: how many words are known."""
        explained = with_near_words(near)
        super().__init__(f"no word of the query is in the run's vocabulary of {vocabulary:,} words: {explained}")
        self.near, self.vocabulary = near, vocabulary


def answer_text(encoder: RunEncoder, index: Index, text: str, top: int, split: str | None = None) -> dict[str, Any]:
    """The images and texts nearest to a text, as `search.py --json` prints them.

    Raises UserError where the text encoder reads words and the text has none, and UnknownWords where it knows none of
    them.
    """
    if encoder.new_inputs:
        (query,), problems = encoder.texts([text])
        if problems:
            raise UserError(f"the query cannot be searched: {problems[0]}")
        asked = {"text": text, "words": [], "ignored_words": [], "near_words": {}}
        return {"query": asked, **search_index(index, query, ("images", "texts"), top, split)}
    known, unknown = encoder.words(text)
    if not known and not unknown:
        raise UserError("the query has no word: stop words and short words do not count, as in training")
    near = {word: near_words(word, encoder.vocabulary) for word in unknown[:MAX_EXPLAINED_WORDS]}
    if not known:
        raise UnknownWords(near, len(encoder.vocabulary) - len(SPECIAL_WORDS))
    (query,), _ = encoder.texts([text])
    asked = {"text": text, "words": known, "ignored_words": unknown, "near_words": near}
    return {"query": asked, **search_index(index, query, ("images", "texts"), top, split)}


def answer_image(
    encoder: RunEncoder, index: Index, path: Path | str, top: int, split: str | None = None, **limits: int
) -> dict[str, Any]:
    """The texts and images nearest to an image file, as `search.py --json` prints them.

    `limits` may hold `max_pixels`. Raises UserError where the file cannot be read.
    """
    (query,), problems = encoder.images([path], **limits)
    if problems:
        raise UserError(f"{path} is no image that can be read: {problems[0]}")
    return {"query": {"image": str(path)}, **search_index(index, query, ("texts", "images"), top, split)}


def answer_pair(index: Index, pair: int, top: int, split: str | None = None) -> dict[str, Any]:
    """As `answer_image`, for an indexed image by its pair number. Raises KeyError where it is not in the index."""
    if not index.holds_image(pair):
        raise KeyError(pair)
    query = np.array(index.images.vectors[np.searchsorted(index.images.pairs, pair)])
    return {"query": {"pair": pair}, **search_index(index, query, ("texts", "images"), top, split)}


def search_index(
    index: Index, query: np.ndarray, kinds: tuple[str, ...], top: int, split: str | None = None
) -> dict[str, str | list[dict[str, Any]]]:
    """The `top` items of each kind (`images`, `texts`) that are nearest to a query (D,) or (K, D), described."""
    answer: dict[str, str | list[dict[str, Any]]] = {"score": "cosine similarity", "split": split or "all"}
    for kind in kinds:
        items = index.items(kind)
        answer[kind] = [
            {"rank": rank, "score": round(score, 6), **index.describe(int(items.pairs[place]))}
            for rank, (place, score) in enumerate(items.nearest(query, top, split), start=1)
        ]
    return answer


def draw_pairs(index: Index, count: int, seed: int, split: str | None = None) -> list[dict[str, Any]]:
    """`count` pairs of different images, or all where there are fewer, drawn by seed and described as in an answer."""
    items = index.images
    places = np.arange(len(items.pairs)) if split is None else np.flatnonzero(items.splits == SPLITS.index(split))
    drawn = np.random.default_rng(seed).choice(places, min(count, len(places)), replace=False)
    return [index.describe(pair) for pair in items.pairs[drawn].tolist()]


def common_words(vocabulary: Mapping[str, int], count: int) -> list[str]:
    """The `count` most common words of the train split, the most common first, as vocabulary.txt lists them."""
    return [word for word in vocabulary if word not in SPECIAL_WORDS][:count]


def near_words(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """Up to three words of the vocabulary with a spelling similar to `word`, the most similar first."""
    near = difflib.get_close_matches(word, vocabulary, n=3, cutoff=0.7)
    return [other for other in near if other not in SPECIAL_WORDS]


def with_near_words(near: Mapping[str, list[str]]) -> str:
    """Unknown words, each with its similar known words in brackets."""
    return ", ".join(f"{word} (near it: {', '.join(others)})" if others else word for word, others in near.items())


# The table of an answer


def print_answer(answer: dict[str, Any]) -> None:
    """Print a table of each kind of item in the answer."""
    ignored = answer["query"].get("ignored_words")
    if ignored:
        near = answer["query"]["near_words"]
        print(f"ignored, not in the vocabulary: {with_near_words({word: near.get(word, []) for word in ignored})}")
    for kind in [kind for kind in answer if kind in ("texts", "images")]:
        print(f"{kind} by {answer['score']}")
        print(f"rank   score    pair  split  {'text':{TEXT_WIDTH}}  image")
        for item in answer[kind]:
            print(
                f"{item['rank']:4d}  {item['score']:6.4f}  {item['pair']:6d}  {item['split']:5}  "
                f"{fit_columns(item['text'], TEXT_WIDTH)}  {printable(item['path'])}"
            )


def printable(text: str) -> str:
    """`text` in one line, without characters that control a terminal."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def fit_columns(text: str, width: int) -> str:
    """`text` cut or padded to `width` columns of a terminal. A Chinese character takes two columns."""
    text = printable(text)
    columns = [0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text]
    if sum(columns) > width:
        while sum(columns) > width - 1:
            columns.pop()
        text, columns = text[: len(columns)] + "…", [*columns, 1]
    return text + " " * (width - sum(columns))
