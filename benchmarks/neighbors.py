"""From how many rows on HNSW finds neighbors faster than exact search, on real Doc2Vec vectors.

    python benchmarks/neighbors.py --work work/web_news --texts work/web_news --sentences --save sentences.npy
    python benchmarks/neighbors.py --vectors sentences.npy [--rows 5000 20000 50000] [--k 200]
    python benchmarks/neighbors.py --work work/conceptual_captions

The first embeds texts with the Doc2Vec model of a prepared WORK folder (--config is that with which it was made) and
saves the vectors: of another WORK's texts, or of a file of one text a line, each as a whole or sentence by sentence;
equal texts once, those without a known word not at all. Without --vectors the vectors are WORK's own, step 2's. Of
equal vectors one is used.

Measured is neighbors.find_neighbors for all rows, with all cores: exact search, and HNSW from building to the last
answer, with the comparison with exact search on 1,000 rows by which its effort is raised to a recall of 0.95. The rows
are drawn from the vectors by seed; none are made up where there are too few. Then, for the largest number of rows, the
recall and time of HNSW at several efforts. The crossover is what neighbors.EXACT_UP_TO should be.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # before this folder, whose neighbors.py is another one

from timing import Timing, machine, print_table, shown, spread  # noqa: E402

from pipeline.command_line import run_script  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.files import read_array, write_array  # noqa: E402
from pipeline.processes import cores  # noqa: E402
from pipeline.schema import Neighbors, Settings  # noqa: E402
from pipeline.settings import load_settings  # noqa: E402
from text_space.doc2vec import embed_batches, text_batches  # noqa: E402
from text_space.neighbors import GraphSearch, exact_neighbors, find_neighbors, recall  # noqa: E402
from text_space.tokenizer import load_tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a prepared WORK folder, for its vectors or its Doc2Vec model")
    parser.add_argument("--config", default=ROOT / "configs" / "web_news.yaml", help="settings of that WORK")
    parser.add_argument("--vectors", type=Path, help=".npy of vectors, in place of WORK's")
    parser.add_argument("--texts", type=Path, help="embed these, a WORK folder's or a file's, and search no neighbors")
    parser.add_argument("--sentences", action="store_true", help="each sentence is a text of its own")
    parser.add_argument("--save", type=Path, help="where the vectors of --texts go")
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 20_000, 50_000, 100_000, 200_000])
    parser.add_argument("--k", type=int, default=200, help="neighbors of a row")
    parser.add_argument("--efforts", type=int, nargs="+", default=[100, 200, 400, 800, 1600, 3200], help="of the curve")
    parser.add_argument("--queries", type=int, default=2000, help="rows that the curve's times are measured on")
    parser.add_argument("--repeats", type=int, default=1, help="searches of each kind")
    arguments = parser.parse_args()
    if not (arguments.work or arguments.vectors) or (arguments.texts and not (arguments.work and arguments.save)):
        parser.error("give --vectors or --work; --texts wants --work and --save")
    if arguments.texts:
        settings = load_settings(arguments.config)
        settings.work = str(arguments.work)
        save_vectors(settings, arguments.texts, arguments.sentences, arguments.save)
        return
    vectors = np.asarray(read_array(arguments.vectors or arguments.work / "doc2vec" / "vectors.npy"))
    vectors = np.unique(vectors[vectors.any(axis=1)], axis=0)
    sizes = [rows for rows in sorted(arguments.rows) if rows <= len(vectors)]
    for rows in sorted(set(arguments.rows) - set(sizes)):
        print(f"{rows:,} rows are not measured: there are {len(vectors):,} vectors")
    if not sizes:
        raise UserError(f"there are only {len(vectors):,} vectors; give fewer --rows")
    order = np.random.default_rng(0).permutation(len(vectors))
    of_size = [np.ascontiguousarray(vectors[np.sort(order[:rows])]) for rows in sizes]
    compare(of_size, arguments.k, arguments.repeats)
    curve(of_size[-1], arguments.k, arguments.efforts, arguments.queries)
    print(f"\n{vectors.shape[1]} dimensions, k {arguments.k}. {machine()}")


# Vectors


def save_vectors(settings: Settings, source: Path, sentences: bool, path: Path) -> None:
    """Embed the texts of `source` with WORK's model and save the vectors of those with a known word."""
    if source.is_dir():
        texts: Iterable[str] = (text for batch in text_batches(source) for text in batch)
    else:
        texts = (line.strip() for line in source.open())
    if sentences:
        split = load_tokenizer(settings.work_folder, settings.text, settings.dataset.language).sentences
        texts = (sentence for text in texts for sentence in split(text))
    different = list(dict.fromkeys(texts))
    found = []
    with tqdm(total=len(different), desc="vectors", unit="text", disable=None) as progress:
        batches = (different[start : start + 1000] for start in range(0, len(different), 1000))
        for embedded in embed_batches(settings, batches, cores()):
            found.append(embedded.vectors[embedded.lengths > 0])
            progress.update(len(embedded.vectors))
    vectors = np.concatenate(found)
    write_array(path, vectors)
    print(f"{len(vectors):,} vectors of {len(different):,} different texts\nwrote {path}")


# Measuring


def compare(of_size: list[np.ndarray], k: int, repeats: int) -> None:
    """Print the table of exact search and HNSW by number of rows, and where they take as long."""
    rows, seconds = [], []
    searched(of_size[0][: k + 1], Neighbors(method="exact", k=k), 1)  # loads Faiss
    for vectors in of_size:
        exact, _ = searched(vectors, Neighbors(method="exact", k=k), repeats)
        try:
            hnsw, figures = searched(vectors, Neighbors(method="hnsw", k=k), repeats)
        except UserError as error:
            rows.append([f"{len(vectors):,}", exact, f"none: {error}", "", "", "", ""])
            continue
        seconds.append((len(vectors), exact.median, hnsw.median))
        found = [shown(figures["build_seconds"]), shown(figures["search_seconds"])]
        rows.append([f"{len(vectors):,}", exact, hnsw, *found, figures["ef_search"], f"{figures['recall']:.4f}"])
    print_table(["rows", "exact", "HNSW", "of it building", "searching", "efSearch", "recall"], rows)
    print(f"\n{crossover(seconds)}")


def searched(vectors: np.ndarray, settings: Neighbors, repeats: int) -> tuple[Timing, dict[str, Any]]:
    """Seconds of a search for the neighbors of all rows, and its figures."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        _, figures = find_neighbors(vectors, [], settings, seed=0, deterministic=False)
        seconds.append(time.perf_counter() - started)
    return spread(seconds), figures


def crossover(seconds: list[tuple[int, float, float]]) -> str:
    """Where exact search and HNSW take as long, the logarithms of time and rows on a line between two sizes."""
    ahead = [(math.log(rows), math.log(exact / hnsw)) for rows, exact, hnsw in seconds]
    for (x, lead), (next_x, next_lead) in pairwise(ahead):
        if lead <= 0 < next_lead:
            rows = math.exp(x - lead * (next_x - x) / (next_lead - lead))
            return f"Crossover: HNSW is as fast as exact search at about {rows:,.0f} rows."
    if not ahead:
        return "Crossover: none, HNSW did not reach its recall."
    return f"Crossover: none, {'exact search' if ahead[-1][1] <= 0 else 'HNSW'} is faster at all of these sizes."


def curve(vectors: np.ndarray, k: int, efforts: list[int], queries: int) -> None:
    """Print recall and time of HNSW by effort, on rows drawn by seed, beside exact search."""
    sample = np.random.default_rng(1).permutation(len(vectors))[:queries]
    graph = GraphSearch(vectors, [], Neighbors(k=k), torch.get_num_threads())
    started = time.perf_counter()
    truth = exact_neighbors(vectors, sample, k, [], "faiss")
    rows = [["exact", "1.0000", shown((time.perf_counter() - started) / len(sample))]]
    for effort in efforts:
        graph.effort = effort
        started = time.perf_counter()
        found = graph.neighbors(sample)
        taken = (time.perf_counter() - started) / len(sample)
        rows.append([effort, f"{recall(found, truth):.4f}", shown(taken)])
    print(f"\n{len(vectors):,} rows, {len(sample):,} asked about:")
    print_table(["efSearch", "recall", "time a row"], rows)


if __name__ == "__main__":
    run_script(main)
