"""Plain lines of progress where stderr is no terminal."""

import io
import threading

import pytest

from pipeline import progress
from pipeline.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, at its place 0."""
    now = [1000.0]
    monkeypatch.setattr(ProgressBar, "said", None)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_says_once_a_minute_how_far_work_is(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(total=3000, desc="features", unit="image") as bar:
        for _ in range(300):  # five minutes
            clock[0] += 1
            bar.update(10)
    assert lines(capsys) == [
        f"features: {600 * minute:,} of 3,000 images, 0{minute}:00 so far, about 0{5 - minute}:00 left"
        for minute in range(1, 6)
    ]


def test_short_works_one_after_the_other_are_told_too(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for epoch in range(1, 31):  # of ten seconds each
        for _ in ProgressBar(range(5), desc=f"epoch {epoch}", unit="batch"):
            clock[0] += 2
    told = lines(capsys)
    assert [line.split(":")[0] for line in told] == [f"epoch {epoch}" for epoch in (6, 12, 18, 24, 30)]
    assert told[0] == "epoch 6: 5 of 5 batches, 00:10 so far, about 00:00 left"


def test_a_unit_that_takes_minutes_is_told_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """No update looks at the clock meanwhile. The inner work is told, once there is one."""
    told = threading.Event()

    class Log(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if text.strip():
                told.set()
            return written

    monkeypatch.setattr(ProgressBar, "said", None)
    monkeypatch.setattr(ProgressBar, "is_watched", False)
    monkeypatch.setattr(progress, "SECONDS", 0.1)
    monkeypatch.setattr("sys.stderr", log := Log())
    with ProgressBar(total=15, desc="runs", unit="run"):
        assert told.wait(30) and log.getvalue().startswith("runs: 0 of 15 runs, 00:00 so far")
        with ProgressBar(total=60, desc="epoch", unit="batch"):
            while "epoch: 0 of 60 batches" not in log.getvalue():
                told.clear()
                assert told.wait(30)


def test_short_work_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in ProgressBar(range(5), desc="short", unit="item"):
        clock[0] += 2
        ProgressBar.write("a line of its own")
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == 5 * "a line of its own\n"


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for _ in ProgressBar(range(3), desc="bar", unit="item", file=terminal, mininterval=0):
        pass
    assert "\rbar: 100%" in terminal.getvalue()
