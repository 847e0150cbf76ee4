"""The benchmarks: that each runs from its command line, and that what they compare is comparable."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import losses


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tiled_formula_is_ours_with_weighted_negatives() -> None:
    module = benchmark("losses")
    images, texts, neighbors, _ = module.embeddings(4, dtype=torch.float64)
    for anchors, positives, negatives in ((images, texts, texts), (images, neighbors, images)):
        tiled = module.tiled_loss(anchors, positives, negatives)
        torch.testing.assert_close(losses.angular_npairs_loss(anchors, positives, negatives, negatives_weight=4), tiled)


def test_memory_is_counted() -> None:
    module = benchmark("losses")
    batch = module.embeddings(8)

    def step(batch: list[torch.Tensor]) -> torch.Tensor:
        return (batch[0] + 1).exp().exp().sum()

    held = batch[0].numel() * 4
    assert module.kept_for_backward(step, batch) == 2 * held  # what both exp return
    assert 2 * held <= module.peak(step, batch) <= 5 * held


def test_crossover() -> None:
    module = benchmark("neighbors")
    assert "about 1,000 rows" in module.crossover([(100, 1.0, 10.0), (10_000, 100.0, 10.0)])
    assert "exact search is faster" in module.crossover([(100, 1.0, 2.0), (1000, 2.0, 3.0)])
    assert "HNSW is faster" in module.crossover([(100, 2.0, 1.0)])


def test_timing() -> None:
    timing = benchmark("timing")
    calls: list[int] = []
    taken = timing.timed(lambda: calls.append(1), repeats=3)
    assert len(calls) == 4 and 0 <= taken.lowest <= taken.median <= taken.highest
    assert [timing.shown(each) for each in (234.5, 2.345, 0.02, 3e-6)] == ["234 s", "2.3 s", "20.0 ms", "3 µs"]
    assert timing.exponent([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "heads"),
    [
        (
            "losses",
            ["--sizes", "4", "8", "--tiled-up-to", "4", "--repeats", "2"],
            ["| B | ours | tiled |", "exponent of B"],
        ),
        ("doc2vec", ["--texts", "300", "--epochs", "1"], ["from a file", "| PV-DM, hierarchical softmax |"]),
        ("evaluation", ["--pairs", "500", "--captions", "2", "--repeats", "1"], ["bootstrap intervals |", "| all |"]),
    ],
)
def test_benchmark_prints_its_table(script: str, words: list[str], heads: list[str]) -> None:
    printed = run_script(f"benchmarks/{script}.py", *words).stdout
    for head in (*heads, "cores", "torch"):
        assert head in printed


@pytest.mark.slow
def test_benchmark_of_neighbors(prepared_once: Path, tmp_path: Path) -> None:
    words = ["--work", prepared_once, "--config", ROOT / "tests" / "tiny.yaml"]
    vectors = tmp_path / "vectors.npy"
    run_script("benchmarks/neighbors.py", *words, "--texts", prepared_once, "--sentences", "--save", vectors)
    count = len(np.load(vectors))
    assert count > 10 and np.load(vectors).shape[1] == 16
    search = ["--vectors", vectors, "--k", "3", "--rows", "8", "100000", "--efforts", "4", "--queries", "5"]
    printed = run_script("benchmarks/neighbors.py", *search).stdout
    assert "100,000 rows are not measured" in printed and "Crossover" in printed
    assert "| efSearch | recall |" in printed


@pytest.mark.slow
def test_benchmarks_of_input_texts_and_training(prepared: Path) -> None:
    words = ["--work", prepared]
    printed = run_script(
        "benchmarks/input.py", *words, "--images", "20", "--size", "16", "--workers", "0", "1", "--rounds", "1"
    ).stdout
    for head in ("| files | 1 |", "| raw | 0 |", "| jpeg | 1 |", "| files, torchvision | 0 |"):
        assert head in printed
    assert "| bf16 |" in run_script("benchmarks/texts.py", *words, "--texts", "20", "--repeats", "1").stdout
    small = ["--backbone", "resnet18", "--size", "32", "--batch-sizes", "8", "--steps", "1", "--rounds", "1"]
    printed = run_script(
        *("benchmarks/training.py", *words, "--config", ROOT / "tests" / "tiny.yaml", *small),
        *("--precisions", "float32", "--sources", "raw", "files", "--batches", "random", "neighborhoods"),
    ).stdout
    assert printed.count("| float32 | 8 |") == 4 and "bare images/s" in printed
