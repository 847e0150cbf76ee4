"""Processes that share a step's work."""

import os
import signal
from collections.abc import Iterator
from multiprocessing import active_children

import pytest
from conftest import ROOT

from pipeline.errors import UserError
from pipeline.processes import in_order, one_thread_each


def square(number: int) -> int:
    return number * number


def kill_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [0, 2])
def test_results_come_in_order_and_items_are_taken_as_they_are_needed(processes: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = in_order(square, items(), processes)
    assert next(results) == 0 and len(taken) == 2 * processes + 1
    assert list(results) == [number * number for number in range(1, 20)]


def test_a_process_that_is_killed_ends_the_work() -> None:
    with pytest.raises(UserError, match="a worker process was killed, perhaps for want of memory"):
        list(in_order(kill_at_three, range(10), 2))


def test_work_is_shared_by_in_order_which_tells_of_a_killed_process() -> None:
    scripts = (path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "work"))
    users = {str(path.relative_to(ROOT)) for path in scripts if "process_pool(" in path.read_text(encoding="utf-8")}
    assert users == {"pipeline/processes.py", "images/files.py"}  # the latter says what it was that took the memory


def threads(_: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_processes_of_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with one_thread_each():
        assert list(in_order(threads, range(2), 1)) == ["1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    with one_thread_each():
        pass
    assert "OMP_NUM_THREADS" not in os.environ


def never_end(_: int) -> None:
    while True:
        signal.pause()


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_no_task_is_waited_for_when_the_work_is_stopped(end: type[BaseException]) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise end

    before = set(active_children())
    with pytest.raises(end):
        list(in_order(never_end, items(), 2))
    assert set(active_children()) <= before
