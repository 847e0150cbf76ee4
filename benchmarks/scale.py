"""How long steps 0 to 3 take, and how much memory they need, at any number of pairs.

    python benchmarks/scale.py --pairs 100000 [--epochs 1] [--query-sample 10000] [--folder DIR] [--keep]
    python benchmarks/scale.py --table

The first makes up a dataset in the form of Conceptual Captions (two TSVs, tar shards with an image of one pixel a
pair), runs the steps on it with configs/conceptual_captions.yaml, headers of images checked and near-duplicate texts
looked for, and adds a line to benchmarks/scale.jsonl. The second prints those lines as the tables of
benchmarks/README.md.

Memory is anonymous memory (RssAnon in Linux's /proc: what cannot be dropped and read again from a file), summed over
all processes of a step, the highest of samples taken every 0.2 seconds. Texts are drawn from a Zipf vocabulary, half of
each text's words from one of 1,000 topics' own; every hundredth text repeats an earlier one but for a word.
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timing import exponent  # noqa: E402

from pipeline.command_line import run_script  # noqa: E402
from pipeline.files import read_array  # noqa: E402
from pipeline.pairs import numbered, read_pairs, rows_of_split  # noqa: E402
from pipeline.processes import cores  # noqa: E402
from pipeline.provenance import processor  # noqa: E402
from pipeline.settings import load_settings  # noqa: E402
from pipeline.steps import FIND_NEIGHBORS  # noqa: E402
from text_space.neighbors import ROWS_A_STEP, GraphSearch, exact_neighbors, recall  # noqa: E402
from text_space.table import rows_of, same_words  # noqa: E402

RESULTS = Path(__file__).parent / "scale.jsonl"
SCRIPTS = ("prepare_dataset.py", "train_doc2vec.py", "extract_doc2vec_vectors.py", "knn_document_features.py")
STAMPS = {
    "train_doc2vec.py": "doc2vec/train_doc2vec.json",
    "knn_document_features.py": FIND_NEIGHBORS.stamp.format(space="doc2vec"),
}
VOCABULARY, TOPICS, TOPIC_WORDS = 60_000, 1_000, 200
PER_SHARD = 10_000
SYLLABLES = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "or", "un")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, help="pairs to make up")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of Doc2Vec, and of inference (paper: 20)")
    parser.add_argument("--query-sample", type=int, help="ask HNSW about so many rows only, and not about all")
    parser.add_argument("--folder", type=Path, help="folder for the dataset and what the steps write")
    parser.add_argument("--keep", action="store_true", help="leave the folder as it is; a call with it goes on there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the measurements are added to")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)  # step 3 on a sample, in a process of its own
    arguments = parser.parse_args()
    if arguments.table:
        print_tables([json.loads(line) for line in arguments.results.read_text().splitlines()])
        return
    if arguments.ask:
        ask_a_sample(arguments.ask, arguments.query_sample)
        return
    if not arguments.pairs or arguments.pairs < 1000:
        parser.error("--pairs must be at least 1000")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        measured = measure(folder, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    with arguments.results.open("a") as file:
        file.write(json.dumps(measured) + "\n")
    print_tables([measured])


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the dataset, run the steps, and return what was measured; what `folder` has of either is not made again."""
    root, work = folder / "data", folder / "work"
    if not root.is_dir():
        make_dataset(root.with_name("data.part"), arguments.pairs)
        root.with_name("data.part").rename(root)
    words = ["--config", str(ROOT / "configs" / "conceptual_captions.yaml"), "--dataset.root", str(root)]
    words += ["--work", str(work), "--dataset.near_duplicates", "true", "--dataset.check_images", "header"]
    words += ["--doc2vec.epochs", str(arguments.epochs)]
    so_far = folder / "steps.json"
    steps = json.loads(so_far.read_text()) if so_far.is_file() else {}
    for script in SCRIPTS:
        if script in steps:
            continue
        command = [sys.executable, str(ROOT / script), *words]
        if script == SCRIPTS[3] and arguments.query_sample:
            command = [sys.executable, __file__, "--ask", str(work), "--query-sample", str(arguments.query_sample)]
        before = processor_seconds()
        seconds, peak, printed = watched(command)
        used = processor_seconds() - before
        steps[script] = {"seconds": round(seconds, 1), "processor_seconds": round(used, 1)}
        steps[script]["peak_anonymous_gb"] = round(peak / 1e9, 3)
        if command[1] == __file__:
            steps[script]["figures"] = json.loads(printed.splitlines()[-1])
        elif script in STAMPS:
            steps[script]["figures"] = json.loads((work / STAMPS[script]).read_text())["figures"]
        so_far.write_text(json.dumps(steps))
    return {
        "pairs": arguments.pairs,
        "epochs": arguments.epochs,
        "query_sample": arguments.query_sample,
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpu": processor(),
        "kept_pairs": pq.read_metadata(work / "pairs.parquet").num_rows,
        "steps": steps,
    }


# The dataset


def make_dataset(root: Path, pairs: int) -> None:
    """Conceptual Captions, made up: as many validation captions in a thousand as the published ones."""
    shutil.rmtree(root, ignore_errors=True)
    validation = max(200, pairs // 200)
    texts = made_up_texts(pairs)
    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")
    for name, part, count in (
        ("Train_GCC-training.tsv", "train", pairs - validation),
        ("Validation_GCC-1.1.0-Validation.tsv", "val", validation),
    ):
        (root / part).mkdir(parents=True)
        progress = tqdm(total=count, desc=f"making {part}", unit="pair", disable=None)
        with (root / name).open("w") as captions, progress:
            for shard, start in enumerate(range(0, count, PER_SHARD)):
                keys = [f"{shard:05d}{number:04d}" for number in range(min(PER_SHARD, count - start))]
                addresses = [f"https://example.com/{part}/{key}.png" for key in keys]
                captions.writelines(f"{next(texts)}\t{address}\n" for address in addresses)
                with tarfile.open(root / part / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                    for key in keys:
                        member = tarfile.TarInfo(f"{key}.png")
                        member.size = content.tell()
                        archive.addfile(member, io.BytesIO(content.getvalue()))
                        archive.members.clear()
                status, message = ["success"] * len(keys), pa.nulls(len(keys), pa.string())
                table = pa.table({"key": keys, "url": addresses, "status": status, "error_message": message})
                pq.write_table(table, root / part / f"{shard:05d}.parquet")
                progress.update(len(keys))


def made_up_texts(count: int, seed: int = 0) -> Iterator[str]:
    """`count` captions of about 10 words; the frequency of the words falls as their rank (Zipf)."""
    rng = np.random.default_rng(seed)
    words = np.array([word(number) for number in range(VOCABULARY)])
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    whole = np.cumsum(frequency / frequency.sum())
    of_topic = np.cumsum(frequency[:TOPIC_WORDS] / frequency[:TOPIC_WORDS].sum())
    earlier: list[str] = []
    for start in range(0, count, PER_SHARD):
        size = min(PER_SHARD, count - start)
        lengths = np.maximum(rng.poisson(10.3, size), 3)
        drawn = np.searchsorted(whole, rng.random(lengths.sum()))
        topics = np.repeat(rng.integers(0, TOPICS, size), lengths)
        own = (topics * 59 + 97 * np.searchsorted(of_topic, rng.random(len(drawn)))) % VOCABULARY
        drawn = np.where(rng.random(len(drawn)) < 0.5, own, drawn)
        for number, numbers in enumerate(np.split(drawn, np.cumsum(lengths)[:-1])):
            if number % 100 == 99:
                yield earlier[number % len(earlier)] + " again"
                continue
            text = " ".join(words[numbers])
            if number % 100 == 0:
                earlier = [*earlier[-999:], text]
            yield text


def word(number: int) -> str:
    """A word for each number, two or three syllables long."""
    first, second = divmod(number, len(SYLLABLES))
    third, first = divmod(first, len(SYLLABLES))
    return SYLLABLES[first] + SYLLABLES[second] + (SYLLABLES[third] if third else "")


# Measuring


def watched(command: list[str]) -> tuple[float, int, str]:
    """Run a command: seconds, highest anonymous memory of all its processes together in bytes, and what it printed."""
    started, peak, ended = time.monotonic(), 0, threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, anonymous_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate()[0]
    seconds = time.monotonic() - started
    ended.set()
    watcher.join()
    print(printed, end="", flush=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, peak, printed


def processor_seconds() -> float:
    """Seconds of processor time of all programs that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def anonymous_memory(root: int) -> int:
    """RssAnon of a process and of all processes below it, in bytes."""
    parents: dict[int, int] = {}
    memory: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(fields["PPid"])
            memory[int(entry.name)] = 1024 * int(fields.get("RssAnon", "0 kB").split()[0])

    def below(process: int) -> bool:
        while process in parents and process != root:
            process = parents[process]
        return process == root

    return sum(size for process, size in memory.items() if below(process))


def ask_a_sample(work: Path, count: int) -> None:
    """Step 3, but for `count` rows only: build the index, raise its recall, ask; print the figures as JSON."""
    settings = load_settings(ROOT / "configs" / "conceptual_captions.yaml").neighbors
    table = read_pairs(work, ["image_id", "split"])
    tokens, offsets = read_array(work / "doc2vec" / "tokens.npy"), read_array(work / "doc2vec" / "offsets.npy")
    train = rows_of_split(table, "train")
    rows = train[np.diff(offsets)[train] > 0]
    groups = (numbered(table["image_id"])[rows], same_words(tokens, offsets, rows))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        vectors = rows_of(read_array(work / "doc2vec" / "vectors.npy"), rows, Path(folder) / "train.npy")
        started = time.monotonic()
        index = GraphSearch(vectors, groups, settings, cores())
        built = time.monotonic()
        sample = np.random.default_rng(0).permutation(len(rows))
        truth = exact_neighbors(vectors, sample[: settings.recall_sample], settings.k, groups, "faiss")
        exact = time.monotonic()
        recalls: dict[int, float] = {}
        limit = len(rows) // ROWS_A_STEP
        while not recalls or (max(recalls.values()) < settings.min_recall and 2 * index.effort <= limit):
            index.effort *= 2 if recalls else 1
            recalls[index.effort] = round(recall(index.neighbors(sample[: settings.recall_sample]), truth), 4)
        asked = time.monotonic()
        index.neighbors(sample[:count])
        seconds = time.monotonic() - asked
    figures = {
        "rows": len(rows),
        "ef_search": index.effort,
        "recall": recalls[index.effort],
        "recalls": recalls,
        "build_seconds": round(built - started, 1),
        "exact_milliseconds_a_row": round(1000 * (exact - built) / settings.recall_sample, 2),
    }
    print(json.dumps({**figures, "search_seconds": round(seconds, 1), "searched_rows": min(count, len(rows))}))


# Tables


def print_tables(results: list[dict[str, Any]]) -> None:
    """What was measured, as Markdown; from two sizes on with the exponent of growth."""
    results = sorted(results, key=lambda result: result["pairs"])
    head = [f"{result['pairs']:,}" for result in results]
    print(f"\n| step | {' | '.join(head)} | exponent |\n| --- |{' ---: |' * (len(head) + 1)}")
    for script in SCRIPTS:
        steps = [result["steps"][script] for result in results]
        cells = [
            f"{step['seconds']:,.0f} s ({step['processor_seconds']:,.0f} s), {step['peak_anonymous_gb']:.2f} GB"
            for step in steps
        ]
        print(f"| `{script}` | {' | '.join(cells)} | {growth(results, script)} |")
    print("\n| pairs | epochs | threads | words a second | HNSW rows | build | asked | search | efSearch | recall |")
    print("| ---: |" * 1 + " ---: |" * 9)
    for result in results:
        words = result["steps"][SCRIPTS[1]]["figures"]["words_per_second"]
        figures = result["steps"][SCRIPTS[3]]["figures"]
        cells = [f"{result['pairs']:,}", result["epochs"], result["threads"] or result["cores"], f"{words:,}"]
        if "build_seconds" in figures:
            cells += [f"{figures['rows']:,}", f"{figures['build_seconds']:,} s"]
            cells += [f"{figures['searched_rows']:,}", f"{figures['search_seconds']:,} s"]
            cells += [figures["ef_search"], f"{figures['recall']:.4f}"]
        else:
            cells += [f"{figures['rows']:,} ({figures['method']})", "", "", "", "", ""]
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"\n{', '.join(sorted({result['cpu'] for result in results}))}")


def growth(results: list[dict[str, Any]], script: str) -> str:
    """b of processor seconds = a * pairs^b, by least squares of the logarithms; blank where two cannot be compared.

    Compared are those with the epochs of the smallest and, of step 3, without a sample of the queries.
    """
    same = [each for each in results if each["epochs"] == results[0]["epochs"]]
    same = [each for each in same if not (script == SCRIPTS[3] and each["query_sample"])]
    points = {each["pairs"]: each["steps"][script]["processor_seconds"] for each in same}
    if len(points) < 2:
        return ""
    return f"{exponent(list(points), list(points.values())):.2f}"


if __name__ == "__main__":
    run_script(main)
