"""The plots of make_report.py as inline SVG in the colours of the page: light, dark, or printed.

Matplotlib draws with stand-in colours and its own font. Both are replaced by CSS variables of report.html.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

INK, FAINT, LINE = "#010101", "#020202", "#030303"
RUNS = ("#110101", "#110202")
CATEGORIES = tuple(f"#2201{number:02x}" for number in range(8))
VARIABLES = {INK: "--ink", FAINT: "--faint", LINE: "--line", RUNS[0]: "--run-a", RUNS[1]: "--run-b"} | {
    colour: f"--category-{number}" for number, colour in enumerate(CATEGORIES)
}

WIDTH = 4.7
"""Inches. On a phone of 375 pixels a plot's text is then nearly as large as the page's."""
MAX_CURVE_POINTS = 250
"""Points of a curve. Of more, neighboring points are averaged."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@contextmanager
def _axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    with rc_context(STYLE):
        figure = Figure((WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element of a page. Screen readers read `title`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # Ids must be unique on the page: unused ones are removed, the others get the plot's name as a prefix.
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", drawn))
    drawn = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", drawn)
    drawn = re.sub(r"(url\(#|href=\"#)", rf"\1{name}-", drawn)
    drawn = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", drawn)
    drawn = re.sub(r"#[0-9a-f]{6}", lambda found: f"var({VARIABLES.get(found[0], '--ink')})", drawn)
    drawn = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", re.sub(r' height="[\d.]+pt"', "", drawn, count=1))
    head, rest = drawn.split(">", 1)
    return Markup(f'{head} role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{rest}'.strip())


def bars(title: str, rows: Sequence[tuple[str, Sequence[Mapping[str, float] | None]]], label: str) -> Markup:
    """Horizontal bars: for each named row a figure of each run (value, low, high, chance), or None.

    The interval is a line over the bar's end, chance a dotted stroke across the row.
    """
    runs = max(len(figures) for _, figures in rows)
    thick = 0.76 / runs
    with _axes(0.62 + (0.2 + 0.17 * runs) * len(rows)) as (figure, axes):
        for place, (_, figures) in enumerate(rows):
            for run, found in enumerate(figures):
                if found is None:
                    continue
                y = place + (run - (runs - 1) / 2) * thick
                axes.barh(y, found["value"], thick * 0.86, color=RUNS[run])
                if "low" in found:
                    axes.plot([found["low"], found["high"]], [y, y], color=INK, linewidth=1.3)
                    for end in (found["low"], found["high"]):
                        axes.plot([end, end], [y - thick / 4, y + thick / 4], color=INK, linewidth=1.3)
            chance = next(found["chance"] for found in figures if found is not None)
            axes.plot([chance, chance], [place - 0.45, place + 0.45], color=INK, linewidth=1.6, linestyle=(0, (1, 1)))
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        return _svg(figure, title)


def curves(title: str, lines: Sequence[tuple[np.ndarray, np.ndarray] | None], label: str) -> Markup:
    """A line for each run, (steps, values), over the training steps; None where a run has none."""
    with _axes(2.3) as (figure, axes):
        for run, line in enumerate(lines):
            if line is not None:
                steps, values = (_thinned(part) for part in line)
                marker = "o" if len(steps) == 1 else None
                axes.plot(steps, values, color=RUNS[run], linewidth=1.7, marker=marker, linestyle=("-", "--")[run])
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, title)


def _thinned(values: np.ndarray) -> np.ndarray:
    """The means of at most MAX_CURVE_POINTS equal parts of values (n,)."""
    parts = np.array_split(values, min(len(values), MAX_CURVE_POINTS))
    return np.array([part.mean() for part in parts])


def distribution(title: str, samples: Sequence[np.ndarray], label: str, *, colours: Sequence[str]) -> Markup:
    """Outlined histograms of one or two samples over the same bins."""
    everything = np.concatenate(samples)
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1e-6, 41)
    with _axes(2.4) as (figure, axes):
        for number, (values, colour) in enumerate(zip(samples, colours, strict=True)):
            heights = 100 * np.histogram(values, edges)[0] / len(values)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, linestyle=("-", "--")[number])
        axes.set_xlabel(label)
        axes.set_ylabel("% of the pairs")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return _svg(figure, title)


def ratios(title: str, values: np.ndarray, label: str) -> Markup:
    """Histogram of positive ratios on a logarithmic axis, with a dotted line at 1."""
    reach = max(float(np.abs(np.log(values)).max()), 0.05)
    edges = np.exp(np.linspace(-reach, reach, 41))
    with _axes(2.4) as (figure, axes):
        heights = 100 * np.histogram(values, edges)[0] / len(values)
        middle = len(edges) // 2
        for part, colour in ((slice(0, middle), RUNS[0]), (slice(middle, None), RUNS[1])):
            axes.stairs(heights[part], edges[part.start : None if part.stop is None else part.stop + 1],
                        fill=True, color=colour)  # fmt: skip
        axes.axvline(1, color=INK, linewidth=1.3, linestyle=(0, (1, 1)))
        axes.set_xscale("log")
        span = np.exp(reach * 0.8)
        axes.set_xticks([1 / span, span**-0.5, 1, span**0.5, span])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(label)
        axes.set_ylabel("% of the pairs")
        return _svg(figure, title)


def scatter(title: str, images: np.ndarray, texts: np.ndarray, colours: np.ndarray) -> Markup:
    """Images (n, 2) as discs and texts (n, 2) as triangles, with a line from each image to its text.

    colours: (n,) positions in CATEGORIES.
    """
    with _axes(WIDTH) as (figure, axes):
        gap = np.full((len(images), 1), np.nan)
        lines = np.stack([np.hstack([images[:, :1], texts[:, :1], gap]), np.hstack([images[:, 1:], texts[:, 1:], gap])])
        axes.plot(*lines.reshape(2, -1), color=FAINT, linewidth=0.5, alpha=0.45, zorder=1)
        for marker, points, size in (("o", images, 22), ("^", texts, 24)):
            for number in np.unique(colours):
                of_category = points[colours == number]
                axes.scatter(
                    of_category[:, 0],
                    of_category[:, 1],
                    size,
                    marker=marker,
                    color=CATEGORIES[number],
                    alpha=0.85,
                    linewidths=0,
                )
        axes.set_aspect("equal", "datalim")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first axis of the map (no unit)")
        axes.set_ylabel("second axis")
        axes.grid(visible=False)
        return _svg(figure, title)
