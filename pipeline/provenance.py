"""What figures were made with: commit, versions of the libraries, processor, day."""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

from pipeline.steps import versions

ROOT = Path(__file__).resolve().parents[1]


def made_with(threads: int) -> dict[str, Any]:
    """Commit, versions, processor, threads and day, as figures note them."""
    return {
        **commit(ROOT),
        "versions": versions(),
        "processor": processor(),
        "threads": threads,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def commit(folder: Path) -> dict[str, Any]:
    """`commit` of the git checkout in `folder`, and `dirty`, whether files differ from it; null where it is none.

    Tables that were made before, in results/, shape no figure.
    """
    try:
        top, head = _git(folder, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() == folder.resolve():  # else the checkout of something else, which holds a copy of this
            changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
            return {"commit": head, "dirty": bool(changed)}
    except (OSError, ValueError, subprocess.CalledProcessError):
        pass
    return {"commit": None, "dirty": None}


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
