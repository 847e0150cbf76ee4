"""Processes that share a step's work. None of them outlives the step."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any

from pipeline.errors import UserError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(processes: int | None = None) -> ProcessPoolExecutor:
    """A pool of processes, by default one a core.

    They are spawned, because forking a process that has threads (Arrow's, tqdm's) can deadlock.
    """
    return ProcessPoolExecutor(processes or cores(), mp_context=get_context("spawn"), initializer=serve)


def in_order(function: Callable[..., Any], items: Iterable[Any], processes: int | None = None) -> Iterator[Any]:
    """`function` of each item, in order, computed by a pool. Few items wait; `pool.map` would read all.

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
                if len(waiting) > 2 * (processes or cores()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; make room and run it again: it resumes "
                "where it was"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def serve() -> None:
    """Make this process a worker: it ignores Ctrl-C, which its parent answers, and exits when its parent dies.

    A worker whose parent was killed would otherwise wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os._exit(1)
