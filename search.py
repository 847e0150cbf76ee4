"""Search a dataset with a trained run: a text finds images, an image finds texts and images.

    python search.py --run work/openclipart/runs/NAME border wall
    python search.py --run work/openclipart/runs/NAME --image photo.jpg
    python search.py --run work/openclipart/runs/NAME --serve

The first call embeds all images and texts of the dataset into RUN/index; it is made anew when the run or the dataset
has changed. The score is the cosine similarity of the embeddings, at most 1. A pair is a row of pairs.parquet; of an
image with several texts the first one is shown. --serve opens a page on this computer alone, to type into and to drop
pictures on.
"""

import argparse
import contextlib
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

from pipeline.command_line import run_script
from pipeline.errors import UserError
from pipeline.pairs import SPLITS
from reporting.retrieval_index import answer_image, answer_text, explained, open_index
from training.encoder import RunEncoder

TEXT_WIDTH = 48


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", help="words to find images for")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, WORK/runs/NAME")
    parser.add_argument("--image", type=Path, help="image file to find texts and images for")
    parser.add_argument("--serve", action="store_true", help="search in a browser, on this computer alone")
    parser.add_argument("--port", type=int, help="of --serve; 0 takes a free one (default: 8000)")
    parser.add_argument("--top", type=int, help="results (default: 10, on the page 24)")
    parser.add_argument("--split", choices=("all", *SPLITS), default="all", help="pairs to search (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if any")
    arguments = parser.parse_args(argv)
    text = " ".join(arguments.text)
    if bool(text.strip()) + bool(arguments.image) + arguments.serve != 1:
        raise UserError("give words to search for, or --image FILE, or --serve")
    if arguments.top is not None and arguments.top < 1:
        raise UserError("--top must be at least 1")
    if arguments.port is not None and not (arguments.serve and 0 <= arguments.port < 2**16):
        raise UserError("--port goes with --serve, and is a number from 0 to 65535")
    if arguments.json and arguments.serve:
        raise UserError("--json is for one query, not for --serve")

    with contextlib.redirect_stdout(sys.stderr):  # the JSON is to be all there is on stdout
        encoder = RunEncoder(arguments.run, arguments.device)
        index = open_index(encoder)
    if arguments.serve:
        from reporting.search_page import make_app, serve

        app = make_app(encoder, index, arguments.top or 24, arguments.split)
        serve(app, 8000 if arguments.port is None else arguments.port)
        return
    top = arguments.top or 10
    split = None if arguments.split == "all" else arguments.split
    if arguments.image:
        answer = answer_image(encoder, index, arguments.image, top, split)
    else:
        answer = answer_text(encoder, index, text, top, split)
    if arguments.json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        print_answer(answer)


def print_answer(answer: dict[str, Any]) -> None:
    """A table of the images, and of the texts where there are some."""
    ignored = answer["query"].get("ignored_words")
    if ignored:
        near = answer["query"]["near_words"]
        print(f"ignored, not in the vocabulary: {explained({word: near.get(word, []) for word in ignored})}")
    for kind in [kind for kind in ("texts", "images") if kind in answer]:
        print(f"{kind} by {answer['score']}")
        print(f"rank   score    pair  split  {'text':{TEXT_WIDTH}}  image")
        for found in answer[kind]:
            print(
                f"{found['rank']:4d}  {found['score']:6.4f}  {found['pair']:6d}  {found['split']:5}  "
                f"{in_columns(found['text'], TEXT_WIDTH)}  {shown(found['path'])}"
            )


def shown(text: str) -> str:
    """`text` in one line and without what a terminal would take for a command."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def in_columns(text: str, width: int) -> str:
    """The beginning of `text` in just so many columns of a terminal, where Chinese characters take two."""
    text = shown(text)
    columns = [0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text]
    if sum(columns) > width:
        while sum(columns) > width - 1:
            columns.pop()
        text, columns = text[: len(columns)] + "…", [*columns, 1]
    return text + " " * (width - sum(columns))


if __name__ == "__main__":
    run_script(main)
