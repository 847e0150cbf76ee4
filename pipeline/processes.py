"""Processes that share a step's work: how many, and that none outlives the step."""

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
    """A pool of so many processes, by default one a core.

    They are spawned: forking a process that has threads (Arrow's, tqdm's) can deadlock.
    """
    return ProcessPoolExecutor(processes or cores(), mp_context=get_context("spawn"), initializer=serve)


def in_order(function: Callable[..., Any], items: Iterable[Any], processes: int | None = None) -> Iterator[Any]:
    """`function` of each item, in order, by a pool; few items wait, where `pool.map` would take them all in at once.

    With 0 processes this one does the work. Raises UserError where a process was killed.
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
                "a process that works for this one was killed, as happens where memory runs out; make room and run it "
                "again: it goes on where it was"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def serve() -> None:
    """Make this process one that works for its parent: the parent answers Ctrl-C, and its end is this one's too.

    Without that, those whose parent was killed would wait for work for ever, or go on with what nobody will read.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os._exit(1)
