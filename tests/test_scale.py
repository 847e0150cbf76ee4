"""The benchmark of steps 0 to 3: that it measures what it says."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, run_script


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_anonymous_memory_of_all_processes_counts_and_mapped_files_do_not(scale: ModuleType, tmp_path: Path) -> None:
    hold = "import time; held = bytearray(150_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(1.5)"
    parent = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; child.wait()"
    _, peak, _ = scale.watched([sys.executable, "-c", parent])
    assert 300e6 < peak < 400e6
    mapped = (
        f"import numpy, time; held = numpy.memmap({str(tmp_path / 'file')!r}, 'u1', 'w+', shape=150_000_000); "
        "held[:] = 1; time.sleep(1); print('done')"
    )
    seconds, peak, printed = scale.watched([sys.executable, "-c", mapped])
    assert seconds > 1 and peak < 100e6 and printed == "done\n"


def test_made_up_texts(scale: ModuleType) -> None:
    texts = list(scale.made_up_texts(20_000))
    assert texts == list(scale.made_up_texts(20_000)) and len(texts) == 20_000
    counts = Counter(word for text in texts for word in text.split())
    ranked = [count for _, count in counts.most_common()]
    assert ranked[0] > 3 * ranked[9] > 9 * ranked[999]
    assert len({scale.word(number) for number in range(scale.VOCABULARY)}) == scale.VOCABULARY
    assert texts[199].removesuffix(" again") in texts[:199]


def test_growth(scale: ModuleType) -> None:
    def result(pairs: int, seconds: float, **more: object) -> dict:
        steps = {script: {"seconds": 7.0, "processor_seconds": seconds} for script in scale.SCRIPTS}
        return {"pairs": pairs, "epochs": 1, "query_sample": None, "steps": steps, **more}

    results = [result(1000, 2.0), result(10_000, 20 * 10**0.5), result(10**6, 1.0, query_sample=5)]
    first, *_, last = scale.SCRIPTS
    assert scale.growth(results, last) == "1.50"
    assert scale.growth(results[:1], last) == scale.growth(results[::2], last) == ""
    assert scale.growth(results[::2], first) == "-0.10"
    assert scale.growth([results[0], result(10_000, 5.0, epochs=20)], first) == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_benchmark(tmp_path: Path) -> None:
    results = tmp_path / "scale.jsonl"
    words = ["--pairs", "3000", "--epochs", "1", "--folder", tmp_path / "work", "--results", results]
    run_script("benchmarks/scale.py", *words)
    run_script("benchmarks/scale.py", *words[:4], "--folder", tmp_path / "other", "--query-sample", "50", *words[-2:])
    whole, sample = map(json.loads, results.read_text().splitlines())
    assert all(step["seconds"] > 0 and step["peak_anonymous_gb"] > 0.03 for step in whole["steps"].values())
    assert whole["steps"]["knn_document_features.py"]["figures"]["method"] == "hnsw"
    assert sample["steps"]["knn_document_features.py"]["figures"]["searched_rows"] == 50
    assert not (tmp_path / "work").exists()
    shown = run_script("benchmarks/scale.py", "--table", "--results", results).stdout
    assert "| `prepare_dataset.py` |" in shown
