"""HNSW by nmslib and by Faiss: seconds to build and to search, memory, recall.

    python benchmarks/graphs.py [--rows 20000 100000 1000000] [--k 200] [--threads 2]

The points are random (normal, 200 dimensions, seed 0), the hardest case for a graph: they have no structure. Each graph
is built in a process of its own, with the settings' defaults. Memory is the peak of that process less what it takes
with the points alone, over the size of the points. Recall is measured on 1,000 rows against exact search.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timing import machine  # noqa: E402

from pipeline.schema import Neighbors  # noqa: E402
from text_space.hnsw import build_graph  # noqa: E402

DIMENSIONS, QUERIES = 200, 1000


def points_of(rows: int) -> np.ndarray:
    """Random points (rows, 200) float32."""
    return np.random.default_rng(0).normal(size=(rows, DIMENSIONS)).astype(np.float32)


def memory_of(name: str) -> int:
    """`VmRSS`, the memory of this process, or `VmHWM`, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measure(library: str, rows: int, k: int, threads: int, efforts: list[int]) -> None:
    """Print the figures of one graph as JSON."""
    import faiss

    points, settings = points_of(rows), Neighbors()
    faiss.omp_set_num_threads(threads)
    _, truth = faiss.knn(points[:QUERIES], points, k + 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory_of("VmRSS"), time.monotonic()
    graph = build_graph(library, points, settings.hnsw_m, settings.hnsw_ef_construction, threads)
    built, memory = time.monotonic() - started, (memory_of("VmHWM") - before) / points.nbytes
    for effort in efforts:
        started = time.monotonic()
        found = graph.search(points[:QUERIES], k + 1, effort)
        searched = time.monotonic() - started
        recall = float(np.mean([np.isin(one, other).mean() for one, other in zip(truth, found, strict=True)]))
        figures = {"build_s": built, "ms_a_row": 1000 * searched / QUERIES, "memory": memory, "recall": recall}
        print(json.dumps({"effort": effort, **figures}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000, 1_000_000])
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--efforts", type=int, nargs="+", default=[200, 400, 800])
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one[0], int(arguments.one[1]), arguments.k, arguments.threads, arguments.efforts)
        return
    print(machine())
    print("| rows | library | build s | memory / points | efSearch | ms a row | recall |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for rows in arguments.rows:
        for library in ("nmslib", "faiss"):
            command = [sys.executable, __file__, "--one", library, str(rows), "--k", str(arguments.k)]
            command += ["--threads", str(arguments.threads), "--efforts", *map(str, arguments.efforts)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                one = json.loads(line)
                print(
                    f"| {rows:,} | {library} | {one['build_s']:.1f} | {one['memory']:.2f} | {one['effort']} "
                    f"| {one['ms_a_row']:.2f} | {one['recall']:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
