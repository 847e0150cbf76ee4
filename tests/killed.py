"""Run a script until it is about to make a certain call of a Python function, and then kill it with SIGKILL.

    python tests/killed.py CALL SCRIPT.py [ARGUMENTS]

Calls are counted in all threads of the script's `main`: those of the project's functions and of what writes the files,
but not of what reads the settings, which would be most of them. So a moment that is drawn at random is the same moment
on every machine. CALL 0 kills nothing and prints, last, how many calls there were.
"""

import importlib
import os
import signal
import sys
import threading
from itertools import count
from pathlib import Path
from types import FrameType

CALL, SCRIPT = int(sys.argv[1]), Path(sys.argv[2])
ROOT = str(SCRIPT.resolve().parent)
WRITERS = ("torch/serialization.py", "/tensorboard/", "pyarrow/parquet", "numpy/lib/", "gensim/utils.py", "pickle.py")
SETTINGS = tuple(os.path.join(ROOT, "pipeline", name) for name in ("settings.py", "command_line.py"))


def counts(path: str) -> bool:
    """Whether calls of the functions in a file are counted."""
    return (path.startswith(ROOT) and "site-packages" not in path and path not in SETTINGS) or any(
        part in path for part in WRITERS
    )


def main() -> None:
    sys.argv = sys.argv[2:]
    sys.path.insert(0, ROOT)
    script, config = importlib.import_module(SCRIPT.stem), importlib.import_module("pipeline.command_line")
    calls, known, process = count(1), {}, os.getpid()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            path = frame.f_code.co_filename
            if path not in known:
                known[path] = counts(path)
            if known[path] and next(calls) == CALL and os.getpid() == process:  # not in a fork
                os.kill(process, signal.SIGKILL)

    threading.setprofile(profile)
    sys.setprofile(profile)
    config.run_script(script.main)
    sys.setprofile(None)
    print(next(calls) - 1)


if __name__ == "__main__":  # and not in the processes that the script spawns
    main()
