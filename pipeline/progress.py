"""How far long work is: a bar on a terminal, else a plain line a minute."""

import io
import os
import sys
import threading
import time
from typing import Any, ClassVar

from tqdm import tqdm

SECONDS = 60
"""Between two plain lines, of whichever work is under way."""


class ProgressBar(tqdm):
    """tqdm's bar. Where stderr is no terminal it is a plain line every SECONDS, so that a log says how far work is."""

    said: ClassVar[float | None] = None
    """When the last plain line was written, or the first work began."""
    is_watched: ClassVar[bool] = False
    """Whether a thread looks at the clock while no unit of work ends."""

    def __init__(self, iterable: Any = None, desc: str = "", total: int | None = None, **settings: Any) -> None:
        self.is_plain = not sys.stderr.isatty()
        if self.is_plain:
            ProgressBar.said = ProgressBar.said or time.monotonic()
            # The intervals are those at which `display` looks at the clock. tqdm's own writing is dropped.
            settings |= {"leave": False, "delay": 0, "mininterval": 1, "maxinterval": SECONDS, "file": io.StringIO()}
        super().__init__(iterable, desc, total, **settings)
        if self.is_plain and not ProgressBar.is_watched:
            ProgressBar.is_watched = True
            threading.Thread(target=ProgressBar.watch, daemon=True).start()

    @classmethod
    def watch(cls) -> None:
        """Have the newest bar display itself again and again: a unit of work, a training say, can take many minutes."""
        while True:
            time.sleep(SECONDS / 12)
            with cls.get_lock():
                # A bar gets its `start_t` last of all.
                every = cls._instances  # type: ignore[attr-defined]  # the stubs leave it out
                bars = [bar for bar in every if isinstance(bar, ProgressBar) and hasattr(bar, "start_t")]
                if bars:
                    max(bars, key=lambda bar: bar.start_t).display()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write the line where it is time for one."""
        if not self.is_plain:
            super().display(msg, pos)
            return
        now = time.monotonic()
        is_due = msg is None and now - (ProgressBar.said or now) >= SECONDS
        if is_due and (self.n > self.initial or self.format_dict["elapsed"] >= SECONDS):
            ProgressBar.said = now
            print(self.plain_line(), file=sys.stderr, flush=True)

    def plain_line(self) -> str:
        """`features: 1,200 of 3,097 images, 05:00 so far, about 07:54 left`."""
        shown = self.format_dict
        done = f"{self.n:,} of {self.total:,}" if self.total else f"{self.n:,}"
        units = self.unit + ("es" if self.unit.endswith("tch") else "s")
        line = f"{self.desc.removesuffix(': ')}: {done} {units}, {self.format_interval(shown['elapsed'])} so far"
        rate = shown["rate"] or ((self.n - self.initial) / shown["elapsed"] if shown["elapsed"] else 0)
        if self.total and rate:
            line += f", about {self.format_interval((self.total - self.n) / rate)} left"
        return line


def _begin_anew() -> None:
    """A process that is forked later has done nothing yet, and has none of its parent's threads."""
    ProgressBar.said, ProgressBar.is_watched = None, False


os.register_at_fork(after_in_child=_begin_anew)
