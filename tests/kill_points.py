"""Kill a program before each of its operations on files, run it again, and compare what it leaves.

Each try is a fork of a process that has everything imported already, and so takes no longer than the program itself.
"""

import gc
import importlib
import json
import os
import pickle
import random
import shutil
import sqlite3
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from file_operations import KILLED, ROOT, Operation, Operations

TIMES = {"seconds", "words_per_second", "build_seconds", "search_seconds", "searched_rows", "checksum"}
"""In stamps: how long something took, what was left to do for a resumed step, and the checksum of such figures."""
SPEED = "speed/pairs_a_second"


@dataclass
class Program:
    """A script with arguments, or a function `module:name` of a test without, that writes into `folder`."""

    script: str
    words: list[str]
    again: tuple[str, ...] = ()
    """Further arguments of the call after a kill."""
    only: str = ""
    """Operations to which these lines do not lead are passed over."""

    def run(self, again: bool) -> None:
        sys.argv = [self.script, *self.words, *(self.again if again else ())]
        module, _, name = self.script.removesuffix(".py").partition(":")
        main: Callable[[], Any] = getattr(importlib.import_module(module), name or "main")
        importlib.import_module("pipeline.command_line").run_script(main)


def forked(work: Callable[[], Any], log: Path) -> tuple[int, Any]:
    """The exit code of `work` in a fork, and what it returned. What it prints goes into `log`."""
    answer = log.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    if process := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return code, pickle.loads(answer.read_bytes()) if answer.exists() else None
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        result = work()
        answer.write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def kill_everywhere(program: Program, folder: Path, share: float, seed: int, report: Path) -> None:
    """Kill `program` before each operation in `folder`; write what goes wrong, and where, as JSON into `report`.

    folder: holds what the program needs; it is put back before each try.
    share: of the operations, drawn by `seed`; all of a line's are its first, its second and its last.
    """
    os.chdir(ROOT)
    sys.path.insert(0, ROOT)
    before, log = folder.with_name("before"), folder.with_name("log")
    shutil.copytree(folder, before, symlinks=True)

    def put_back() -> None:
        shutil.rmtree(folder)
        shutil.copytree(before, folder, symlinks=True)

    def count() -> tuple[list[Operation], list[str]]:
        operations = Operations(folder)
        program.run(again=False)
        return operations.done, list(sys.modules)

    def killed(point: int) -> None:
        Operations(folder, point)
        program.run(again=False)

    code, counted = forked(count, log)
    assert code == 0, log.read_text()
    operations, modules = counted
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)
    wanted = contents(folder)
    gc.freeze()
    put_back()
    forked(lambda: program.run(again=False), log)  # in a second process, to see that it writes the same
    wrong = []
    if different := differences(wanted, contents(folder)):
        wrong.append(f"undisturbed twice: {different}")
    chosen = [point for point in points(operations) if program.only in str(operations[point].lines)]
    for point in sorted(random.Random(seed).sample(chosen, max(1, round(share * len(chosen))))):
        put_back()
        code, _ = forked(lambda point=point: killed(point), log)
        if code not in (0, KILLED):
            wrong.append(f"before the kill: {log.read_text()}")
        code, _ = forked(lambda: program.run(again=True), log)
        where = f"{point} {operations[point].kind} {operations[point].path} {operations[point].lines[:3]}"
        if code:
            wrong.append(f"{where}: exit code {code}: {log.read_text()[-300:]}")
            continue
        if different := differences(wanted, contents(folder)):
            wrong.append(f"{where}: {different}")
    report.write_text(json.dumps({"operations": len(operations), "points": len(chosen), "wrong": wrong}))


def points(operations: list[Operation]) -> list[int]:
    """The first, the second and the last of the operations that the same lines lead to and that change something."""
    of_lines: dict[Any, list[int]] = defaultdict(list)
    for number, operation in enumerate(operations):
        if operation.changes:
            of_lines[operation.kind, operation.lines].append(number)
    return sorted({number for numbers in of_lines.values() for number in (*numbers[:2], numbers[-1])})


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not there, what is there too much, and what differs."""
    lines = [f"lacks {name}" for name in wanted.keys() - found.keys()]
    lines += [f"has {name}" for name in found.keys() - wanted.keys()]
    return sorted(lines + [f"differs {name}" for name in wanted.keys() & found.keys() if wanted[name] != found[name]])


def contents(folder: Path) -> dict[str, Any]:
    """Every file and folder in `folder` with its content, apart from times and process numbers."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.startswith("events.out.tfevents."):
            kind = name.partition("events.out.tfevents.")[0] + "events" + "".join(path.suffixes[-1:])
            kind = kind if path.suffix in (".evaluation", ".hparams") else kind.rpartition(".")[0]
            found.setdefault(kind, []).extend(_events(path))
        else:
            found[name] = None if path.is_dir() else _content(path)
    return {name: sorted(value) if isinstance(value, list) else value for name, value in found.items()}


def _content(path: Path) -> Any:
    if path.name == ".lock" or path.name.endswith("-tables.log"):
        return None
    if path.name == "last.pt":
        torch = importlib.import_module("torch")
        state = torch.load(path, weights_only=True)
        state.pop("seconds"), state.pop("curves")
        return _plain(state, torch)
    if path.suffix == ".db":
        return _trials(path)
    if path.suffix == ".json":
        value = json.loads(path.read_bytes())
        if "published" in value:
            value["published"] = sorted(value["published"])  # times of what was drawn
        return json.dumps(_without_times(value))
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if key not in TIMES}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def _plain(value: Any, torch: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part, torch) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, torch) for part in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def _trials(path: Path) -> list[tuple[Any, ...]]:
    """Optuna's finished trials, in their order: parameters and values."""
    query = """SELECT p.param_name, p.param_value, v.value FROM trials t
        JOIN trial_params p ON p.trial_id = t.trial_id LEFT JOIN trial_values v ON v.trial_id = t.trial_id
        WHERE t.state IN ('COMPLETE', 'PRUNED') ORDER BY t.number, p.param_name"""
    with closing(sqlite3.connect(path)) as database:
        return [(number, *row) for number, row in enumerate(database.execute(query))]


def _events(path: Path) -> Iterator[tuple[int, str, bytes]]:
    loader = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    for event in loader.LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.tag != SPEED:
                yield event.step, value.tag, value.SerializeToString()
