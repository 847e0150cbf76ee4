"""Processes that share a step's work. None of them outlives the step."""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any, NoReturn

from pipeline.errors import UserError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessPool(ProcessPoolExecutor):
    """A pool whose processes are killed when its `with` block ends in an error or Ctrl-C.

    Python's own pool would wait for their tasks first: for ever, where a disk does not answer.
    """

    def submit(self, *arguments: Any, **options: Any) -> Future:
        """Give the pool a call. The first ones start processes: raises UserError where the system allows none."""
        try:
            return super().submit(*arguments, **options)
        except OSError as error:
            no_processes(error)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """Leave the block."""
        if kind is not None:
            for process in list((self._processes or {}).values()):
                process.kill()
        super().__exit__(kind, *error)


def process_pool(processes: int | None = None) -> ProcessPool:
    """A pool of processes, by default one a core. Raises UserError where the system allows none.

    They are spawned, because forking a process that has threads (Arrow's, tqdm's) can deadlock.
    """
    try:
        return ProcessPool(processes or cores(), mp_context=get_context("spawn"), initializer=serve)
    except (OSError, ImportError, NotImplementedError) as error:
        no_processes(error)


def no_processes(error: Exception) -> NoReturn:
    """Raise UserError for the `error` of a system on which worker processes cannot start."""
    raise UserError(
        f"worker processes cannot start ({error}): they need a few kilobytes of /dev/shm, and a free process each; "
        "start the container with --shm-size=64m, or free some"
    ) from None


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that are started in the block compute with one thread each. Those of other processes are in their way.

    The libraries read these variables when they are loaded.
    """
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(dict.fromkeys(variables, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def in_order(
    function: Callable[..., Any], items: Iterable[Any], processes: int | None = None, *, ahead: int | None = None
) -> Iterator[Any]:
    """`function` of each item, in order, computed by a pool. `ahead` items wait, by default few.

    With 0 processes this process does the work. Raises UserError where a process was killed.
    """
    if processes == 0:
        yield from map(function, items)
        return
    waiting: deque[Future] = deque()
    with process_pool(processes) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > (ahead or 2 * (processes or cores())):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; make room and run it again: it resumes "
                "where it was"
            ) from None


def serve() -> None:
    """Make this process a worker: it ignores Ctrl-C, which its parent answers, and exits when its parent dies.

    A worker whose parent was killed would otherwise wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Let this process exit when its parent dies, whatever it is doing."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os._exit(1)
