"""A script as a process of its own, started as a fork of one that has imported the libraries already."""

import atexit
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import runpy
import sys
import traceback

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


def run_lines(root: str, lines: list[list[str]], folder: str, results: str) -> None:
    """Call the `main` of scripts in this process, one command line after the other, as `run_script` does.

    Writes a JSON list with the exit code, stderr and traceback (or "") of each line into the file `results`. `folder`
    is the working directory and the home.
    """
    os.chdir(folder)
    os.environ["HOME"] = folder
    sys.path.insert(0, root)
    command_line = importlib.import_module("pipeline.command_line")
    found = []
    for script, *words in lines:
        sys.argv, code, trace = [os.path.join(root, script), *words], 0, ""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                command_line.run_script(importlib.import_module(script.removesuffix(".py")).main)
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                trace = traceback.format_exc()
        found.append([code, stderr.getvalue(), trace])
    with open(results, "w") as file:
        json.dump(found, file)
