"""A script as a process of its own, started as a fork of one that has imported the libraries already."""

import atexit
import multiprocessing
import os
import runpy
import sys

LIBRARIES = [
    "datasketch",
    "gensim.models.doc2vec",
    "nltk",
    "PIL.Image",
    "pyarrow.compute",
    "pyarrow.parquet",
    "pydantic",
    "torch._dynamo",  # torch's optimisers import its compiler
    "torch.utils.tensorboard",
]
"""What most scripts import. Importing them takes longer than most tests."""


def run(words: list[str], folder: str, stdout: str, stderr: str) -> None:
    """Run the script `words[0]` with the other words as arguments. What it prints goes into the files."""
    for number, name in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # a script starts its workers as Python does by default
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
