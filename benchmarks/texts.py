"""How long the GRU takes for a minibatch of texts: padded to the longest, those of like length together, or packed.

    python benchmarks/texts.py [--work WORK] [--texts 128] [--max-words 600] [--precisions float32 bf16] [--device cpu]

The texts are drawn at random from the train split of a prepared folder; a step is the GRU's forward and backward pass.
Together is what models.GRUEncoder does on a CPU, packed what it does on a GPU; all three give the same states.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timing import machine, print_table, timed  # noqa: E402

from datasets import WordSequences  # noqa: E402
from models import GRUEncoder  # noqa: E402
from pipeline.command_line import run_script  # noqa: E402
from pipeline.files import read_array  # noqa: E402
from pipeline.pairs import read_pairs, rows_of_split  # noqa: E402
from pipeline.schema import TextEncoder  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "web_news", help="a prepared folder")
    parser.add_argument("--texts", type=int, default=128, help="texts in a minibatch")
    parser.add_argument("--max-words", type=int, default=600, help="words of a text that are read")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    folder, device = arguments.work / "doc2vec", arguments.device
    texts = WordSequences(
        tokens=read_array(folder / "tokens.npy"),
        offsets=read_array(folder / "offsets.npy"),
        max_words=arguments.max_words,
    )
    rows = rows_of_split(read_pairs(arguments.work, ["split"]), "train")
    rows = rows[np.diff(texts.offsets)[rows] > 0]
    tokens, lengths = texts.texts(np.random.default_rng(0).permutation(rows)[: arguments.texts])
    gru = GRUEncoder(TextEncoder(), np.array(read_array(folder / "word_vectors.npy")), 256).to(device)
    ways = (padded, GRUEncoder.last_states, GRUEncoder.last_states_packed)
    table = []
    for precision in arguments.precisions:

        def step(way: Callable[..., Tensor], bf16: bool = precision == "bf16") -> None:
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
                states = way(gru, tokens.to(device), lengths)
            states.float().square().sum().backward()

        table.append([precision, *(timed(lambda way=way: step(way), arguments.repeats, device) for way in ways)])
    print_table(["precision", "padded", "together", "packed"], table)
    words = f"{lengths.float().mean():.0f} words, the longest of {lengths.max()} ({arguments.work.name})"
    print(f"\n{len(lengths)} texts of {words}; median (lowest .. highest). {machine(device)}")


def padded(gru: GRUEncoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    """As `GRUEncoder.last_states`, all texts padded to the longest."""
    states, _ = gru.gru(gru.embed(tokens))
    last = (lengths.to(states.device) - 1)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, last).squeeze(1)


if __name__ == "__main__":
    run_script(main)
