"""How long step 5 takes once the pairs are embedded.

    python benchmarks/evaluation.py [--pairs 33000] [--captions 1] [--device cuda]

Makes up unit embeddings of 256 dimensions, texts near their images, and Doc2Vec vectors of 200, and measures them as
evaluate.py does (reporting/evaluation.py): k-way Recall@1 for k 5 and 20 and the full gallery's recall both ways,
neighborhood preservation of 200 and of 1 % for images and texts, mAP over --categories, and the 95 % interval of each.
With --captions 5 five pairs share an image, as in COCO. Prints the wall time of all and of its parts, and the peak of
the process's memory.
"""

import argparse
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timing import machine, print_table, shown, synchronise, timed  # noqa: E402

import metrics  # noqa: E402
from metrics import EmbeddedPairs  # noqa: E402
from pipeline.schema import Settings  # noqa: E402
from reporting import evaluation  # noqa: E402

PARTS = {
    "rank_pairs": "ranks of the pairs, both ways",
    "all_preserved_shares": "neighborhood preservation",
    "average_precisions": "mAP by category, both ways",
    "bootstrap_interval": "bootstrap intervals",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=33_000, help="test pairs")
    parser.add_argument("--captions", type=int, default=1, help="pairs that share an image")
    parser.add_argument("--categories", type=int, default=0, help="categories for mAP; 0 measures none, as without any")
    parser.add_argument("--repeats", type=int, default=3, help="timed evaluations, after one that is not")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    made_up = draw(arguments.pairs, arguments.captions, arguments.categories, arguments.device)
    settings, spent = Settings().evaluation, defaultdict(float)
    for name in PARTS:
        module = evaluation if name == "bootstrap_interval" else metrics
        setattr(module, name, clocked(getattr(module, name), name, spent, arguments.device))

    def measure() -> None:
        evaluation.measure(EmbeddedPairs(*made_up), settings, seed=0)

    total = timed(measure, arguments.repeats, arguments.device)
    calls = arguments.repeats + 1
    parts = [[title, shown(spent[name] / calls)] for name, title in PARTS.items() if name in spent]
    images = len(np.unique(made_up[2]))
    print_table([f"{arguments.pairs:,} pairs of {images:,} images", "time"], [*parts, ["all", total]])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    on_gpu = f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU's" if made_up[0].is_cuda else ""
    print(f"\nPeak memory {memory / 1e9:.2f} GB{on_gpu}. Parts are means of {calls} calls. {machine(arguments.device)}")


def draw(
    pairs: int, captions: int, categories: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of images and texts, image numbers, category numbers and Doc2Vec vectors of made-up pairs."""
    rng = np.random.default_rng(0)
    groups = np.arange(pairs) // captions
    images = rng.standard_normal((groups[-1] + 1, 256), dtype=np.float32)[groups]
    texts = images + 2 * rng.standard_normal(images.shape, dtype=np.float32)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(each), dim=1).to(device) for each in (images, texts))
    labels = groups % categories if categories else np.full(pairs, -1)
    return x, y, groups, labels, rng.standard_normal((pairs, 200), dtype=np.float32)


def clocked(call: Callable[..., Any], name: str, spent: dict[str, float], device: str) -> Callable[..., Any]:
    """`call`, the seconds of which are added to `spent[name]`."""

    def timed_call(*arguments: Any, **more: Any) -> Any:
        synchronise(device)
        started = time.perf_counter()
        result = call(*arguments, **more)
        synchronise(device)
        spent[name] += time.perf_counter() - started
        return result

    return timed_call


if __name__ == "__main__":
    main()
