"""What the benchmarks share: the machine's name, the time of a call, Markdown tables."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipeline.processes import cores
from pipeline.provenance import processor


class Timing(NamedTuple):
    """Seconds of the repeats of a call."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{shown(self.median)} ({shown(self.lowest)} .. {shown(self.highest)})"


def timed(call: Callable[[], object], repeats: int, device: str = "cpu", warm_up: int = 1) -> Timing:
    """Seconds of `call`, `warm_up` calls before left out; on a GPU until its work is done, not only asked for."""
    seconds = []
    for repeat in range(warm_up + repeats):
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        if repeat >= warm_up:
            seconds.append(time.perf_counter() - started)
    return spread(seconds)


def spread(seconds: Sequence[float]) -> Timing:
    """What stands for several times of the same."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def synchronise(device: str) -> None:
    """Wait for what a GPU has been asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def shown(seconds: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.{1 if seconds * factor < 100 else 0}f} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, numbers to the right of their cells."""
    print(f"\n| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of value = a * size^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def machine(device: str = "cpu") -> str:
    """What the figures were measured on, as a line below a table."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if torch.device(device).type == "cuda" else ""
    threads = torch.get_num_threads()
    return f"{gpu}{processor()}, {cores()} cores, {threads} threads, torch {torch.__version__}"
