"""Search a dataset with a trained run: a text or an image finds images and texts.

    python search.py --run work/openclipart/runs/NAME border wall
    python search.py --run work/openclipart/runs/NAME --image photo.jpg
    python search.py --run work/openclipart/runs/NAME --serve

The first call embeds all images and texts of the dataset into RUN/index. The index is rebuilt when the run, the
dataset or --expand has changed. The score is the cosine similarity of the embeddings, at most 1. A pair is a row of
pairs.parquet. An image with several texts is shown with its first text. --serve opens a page for this computer only;
type words there, or drop a picture.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from pipeline.command_line import Parser, run_script
from pipeline.errors import UserError

TABLE_RESULTS, PAGE_RESULTS = 10, 24


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    text, split = " ".join(arguments.text), None if arguments.split == "all" else arguments.split

    from reporting.answers import answer_image, answer_text, print_answer
    from reporting.retrieval_index import open_index
    from training.encoder import RunEncoder

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        encoder = RunEncoder(arguments.run, arguments.device, arguments.expand)
        index = open_index(encoder)
    if arguments.serve:
        from reporting.search_page import make_app, serve

        serve(make_app(encoder, index, arguments.top or PAGE_RESULTS, arguments.split), arguments.port)
        return

    top = arguments.top or TABLE_RESULTS
    if arguments.image:
        answer = answer_image(encoder, index, arguments.image, top, split)
    else:
        answer = answer_text(encoder, index, text, top, split)
    if arguments.json:
        has_all = sys.stdout.encoding.lower().startswith("utf")  # what an encoding lacks is printed in no way of JSON
        print(json.dumps(answer, indent=2, ensure_ascii=not has_all))
    else:
        print_answer(answer)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError for values out of range and arguments that exclude each other."""
    parser = Parser(__doc__)
    parser.add_argument("text", nargs="*", help="words to find images and texts for")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, WORK/runs/NAME")
    parser.add_argument("--image", type=Path, help="image file to find texts and images for")
    parser.add_argument("--serve", action="store_true", help="search in a browser on this computer")
    parser.add_argument("--port", type=int, help="port of --serve; 0 takes a free one (default: 8000)")
    parser.add_argument("--top", type=int, help=f"results (default: {TABLE_RESULTS}, on the page {PAGE_RESULTS})")
    splits = ("all", "train", "val", "test")
    parser.add_argument("--split", choices=splits, default="all", help="pairs to search (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    parser.add_argument(
        "--expand",
        type=float,
        metavar="W",
        help="weight of the nearest train pairs (default: the run's evaluation.expand; see docs/expansion.md)",
    )
    arguments = parser.parse_args(argv)
    if bool(" ".join(arguments.text).strip()) + bool(arguments.image) + arguments.serve != 1:
        raise UserError("give words to search for, or --image FILE, or --serve")
    if arguments.top is not None and arguments.top < 1:
        raise UserError("--top must be at least 1")
    if arguments.port is not None and not (arguments.serve and 0 <= arguments.port < 2**16):
        raise UserError("--port goes with --serve, and is a number from 0 to 65535")
    if arguments.json and arguments.serve:
        raise UserError("--json is for one query, not for --serve")
    if arguments.serve and arguments.port is None:
        arguments.port = 8000
    return arguments


if __name__ == "__main__":
    run_script(main)
