"""How long the loss of one training step takes, forward and backward, and how much memory it needs.

    python benchmarks/losses.py [--sizes 8 16 32 64 128 256 1024] [--tiled-up-to 32] [--device cuda]

Measured is Eq. 8 with all four terms (angular, logsumexp form) on made-up embeddings of 256 dimensions:

- ours: losses.retrieval_loss_terms;
- tiled: the same with the literal formula of the code published with the paper, which repeats every anchor B times and
  gathers for each of the B² anchors the B (B - 1) negatives, O(B⁴) numbers a term. Its value is that of losses.py with
  negatives_weight = B, which is checked first;
- theirs: pytorch-metric-learning's AngularLoss (alpha 45 degrees), of image-to-text and text-to-image alone, beside
  ours of these two terms; their values are checked to be equal. It has nothing to compare L_img and L_text with: its
  negatives are all of what the positives are drawn from, here the neighbors. (Its NPairsLoss is another loss, a cross
  entropy of inner products.)

Memory is what autograd keeps for backward, each tensor counted once and the embeddings themselves not, and the peak of
all tensors of the step, of torch's profiler or of the GPU's allocator.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports every start and stop

import torch
from pytorch_metric_learning.losses import AngularLoss
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # before this folder, whose losses.py is another one

from timing import exponent, machine, print_table, timed  # noqa: E402

from losses import NPairsLoss, angular_npairs_loss, retrieval_loss_terms, weighted_sum  # noqa: E402

DIMENSIONS = 256
WEIGHTS = {"l_i2t": 1.0, "l_sym": 1.0, "l_img": 0.3, "l_text": 0.2}

Step = Callable[[list[Tensor]], Tensor]
"""Embeddings of images, texts, their neighbors' images and texts, (B, D) each, to the loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 1024], help="pairs a batch")
    parser.add_argument("--tiled-up-to", type=int, default=32, help="largest batch of the tiled formula (32: 5 GB)")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps; of the tiled formula 3 at most")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    device = arguments.device
    check(device)
    rows, memory = [], {}
    for size in tqdm(arguments.sizes, desc="batches", unit="size", leave=False, disable=None):
        batch = embeddings(size, device)
        steps = {"ours": ours, "tiled": tiled, "theirs": theirs, "ours, 2 terms": both_ways}
        if size > arguments.tiled_up_to:
            del steps["tiled"]
        times = {}
        for name, step in steps.items():
            memory[name, size] = kept_for_backward(step, batch), peak(step, batch)
            repeats = min(arguments.repeats, 3) if name == "tiled" else arguments.repeats
            times[name] = timed(functools.partial(run, step, batch), repeats, device)
        slower = f"{times['tiled'].median / times['ours'].median:,.0f} x" if "tiled" in times else ""
        rows.append([size, times["ours"], times.get("tiled", ""), slower, times["theirs"], times["ours, 2 terms"]])
    print_table(["B", "ours", "tiled", "tiled / ours", "theirs (2 terms)", "ours (2 terms)"], rows)
    names = ["ours", "tiled", "theirs", "ours, 2 terms"]
    rows = [
        [size, *(" / ".join(map(megabytes, memory[name, size])) if (name, size) in memory else "" for name in names)]
        for size in arguments.sizes
    ]
    rows.append(["exponent of B", *(" / ".join(growth(memory, name, place) for place in (0, 1)) for name in names)])
    rows.append(["of the last two", *(" / ".join(growth(memory, name, i, last=2) for i in (0, 1)) for name in names)])
    print_table(["B", *(f"{name}: kept / peak" for name in names)], rows)
    print(f"\nOne step forward and backward, median (lowest .. highest). {machine(device)}")


def embeddings(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Made-up embeddings of images, texts, neighbors' images and neighbors' texts."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(4, size, DIMENSIONS, generator=generator, dtype=dtype)
    return [part.to(device).requires_grad_() for part in normalize(drawn, dim=2)]


# The losses


def total(base_loss: NPairsLoss, batch: list[Tensor]) -> Tensor:
    """Eq. 8; no neighbor sits in the batch."""
    images, texts, neighbor_images, neighbor_texts = batch
    ids = torch.arange(len(images), device=images.device)
    terms = retrieval_loss_terms(base_loss, images, texts, ids, neighbor_images, neighbor_texts, ids + len(ids))
    return weighted_sum(terms, WEIGHTS)


def tiled_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean log(1 + B Σ exp …) with t = 1, as the published code comes to it: every anchor and every negative B times.

    anchors, positives, negatives: (B, D). The negatives are all but the anchor's own, whatever the mask.
    """
    size = len(anchors)
    anchors, positives, negatives = (x.repeat(size, 1) for x in (anchors, positives, negatives))
    own = torch.arange(size, device=anchors.device).repeat(size)
    others = (own != own[:, None]).nonzero()[:, 1].view(size * size, size * (size - 1))
    negatives = negatives[others]  # (B², B (B - 1), D)
    anchors, positives = anchors[:, None], positives[:, None]
    exponents = 4 * (anchors + positives) @ negatives.transpose(1, 2) - 4 * anchors @ positives.transpose(1, 2)
    highest = exponents.detach().amax(dim=2)
    sums = (exponents - highest[..., None]).exp().sum(dim=2)
    return (highest + (torch.exp(-highest) + sums).log()).mean()


def ours(batch: list[Tensor]) -> Tensor:
    return total(angular_npairs_loss, batch)


def tiled(batch: list[Tensor]) -> Tensor:
    return total(tiled_loss, batch)


def both_ways(batch: list[Tensor]) -> Tensor:
    ids = torch.arange(len(batch[0]), device=batch[0].device)
    return weighted_sum(retrieval_loss_terms(angular_npairs_loss, *batch[:2], ids), {"l_i2t": 1, "l_sym": 1})


def theirs(batch: list[Tensor]) -> Tensor:
    images, texts, *_ = batch
    ids, loss = torch.arange(len(images), device=images.device), AngularLoss(alpha=45)
    # A clone, because labels that are ref_labels tell it to leave out the pairs themselves.
    there = loss(images, ids, ref_emb=texts, ref_labels=ids.clone())
    return there + loss(texts, ids, ref_emb=images, ref_labels=ids.clone())


def check(device: str) -> None:
    """Raise AssertionError where losses that are compared differ.

    AngularLoss normalises embeddings once more, which leaves its value but not its gradients as they are.
    """
    batch = embeddings(6, device, torch.float64)
    weighted = total(functools.partial(angular_npairs_loss, negatives_weight=6.0), batch)
    torch.testing.assert_close(weighted, tiled(batch))
    torch.testing.assert_close(torch.autograd.grad(weighted, batch), torch.autograd.grad(tiled(batch), batch))
    torch.testing.assert_close(both_ways(batch), theirs(batch))


# Measuring


def run(step: Step, batch: list[Tensor]) -> None:
    """Forward and backward."""
    for x in batch:
        x.grad = None
    step(batch).backward()


def kept_for_backward(step: Step, batch: list[Tensor]) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward, without the embeddings."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step(batch)
    for x in batch:
        kept.pop(x.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values())


def peak(step: Step, batch: list[Tensor]) -> int:
    """Bytes of all tensors of a step at the moment when they are most, without the embeddings."""
    for x in batch:
        x.grad = None
    if batch[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(step, batch)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run(step, batch)
    events = sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    held = highest = 0
    for event in events:
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def megabytes(count: int) -> str:
    """Bytes in units that suit them."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def growth(memory: dict[tuple[str, int], tuple[int, int]], name: str, place: int, last: int = 0) -> str:
    """The exponent of B in the memory of a loss, of all sizes or of the last few."""
    points = sorted((size, sizes[place]) for (of, size), sizes in memory.items() if of == name)[-last:]
    return f"{exponent(*zip(*points, strict=True)):.2f}" if len(points) > 1 else ""


if __name__ == "__main__":
    main()
