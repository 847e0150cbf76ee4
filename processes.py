"""Processes that share a step's work: how many, and that none outlives the step."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool() -> ProcessPoolExecutor:
    """A pool of one process a core.

    They are spawned: forking a process that has threads (Arrow's, tqdm's) can deadlock.
    """
    return ProcessPoolExecutor(cores(), mp_context=get_context("spawn"), initializer=serve)


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
