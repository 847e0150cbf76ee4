"""Seconds from the shell to the answer of `--help` and of a wrong flag, of every script.

    python benchmarks/start.py [--repeats 3]

Each figure is the fastest of the repeats, from a warm page cache.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timing import machine  # noqa: E402


def seconds(words: list[str], repeats: int) -> float:
    """The fastest of `repeats` runs of a script."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(machine())
    print("| script | --help | a wrong flag |\n| --- | ---: | ---: |")
    for path in sorted(ROOT.glob("*.py")):
        if "__main__" in path.read_text():
            shown, refused = (seconds([path.name, *words], repeats) for words in (["--help"], ["--no.such", "1"]))
            print(f"| `{path.name}` | {shown:.2f} s | {refused:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
