"""Write a trained run as one file that can be given away.

    python export_run.py --run work/openclipart/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0 --out news.zip

Reads the run's best.pt, config.yaml and encoder files, and metrics.json where it is evaluated. Writes a zip file with
all weights (safetensors), the settings, the vocabulary, the sentence splitter's parameters and a model card. It holds
no pickle, no image and no text. `encode.py --run FILE` and `RunEncoder(FILE)` read it anywhere, without gensim.
"""

import argparse
from pathlib import Path

from pipeline.command_line import Parser, run_script, say_next
from pipeline.errors import UserError


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    run: Path = arguments.run

    from training.encoder import RunEncoder
    from training.portable import FOLDER, export_run

    if run.is_file():
        raise UserError(f"{run} is a file, perhaps an exported run; name the folder of a run, WORK/runs/NAME")
    encoder = RunEncoder(run, "cpu", expand=0.0)
    if not (run / FOLDER).is_dir():
        raise UserError(f"{run} is of an earlier version and has no {FOLDER} folder; train it anew with --overwrite")
    export_run(run, encoder.model, arguments.out)
    print(f"wrote {arguments.out}")
    say_next("python", "encode.py", "--run", arguments.out, "--texts", "TEXTS.txt", "--out", "texts.npy")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, WORK/runs/NAME")
    parser.add_argument("--out", type=Path, required=True, help="zip file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
