"""Plots of reports: matplotlib figures as inline SVG that takes its text colour from the page, or as PNG.

Colours of data are readable on light and on dark; ink (text, axes) is one stand-in colour that becomes `currentColor`
in the SVG, so that one file serves both themes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantlab.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#314159"
BLUE, ORANGE, GREY = "#4a8fe7", "#e8871e", "#8a93a0"
WIDTH = 4.5  # inches, at 9 points: readable when a phone shrinks it to its width
MOST_POINTS = 1024
LEAST_SPAN = 3.0  # of a colour scale in dB: less is no difference worth a colour

STYLE = {
    "font.size": 9, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
    "axes.titlelocation": "left", "svg.fonttype": "none", "font.family": "sans-serif", "legend.frameon": False,
}  # fmt: skip


def require() -> None:
    """Raises UsageError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'quantlab-toolkit[report]'") from None


@dataclass(frozen=True)
class Plot:
    """A figure, its name (of the PNG file, and in ids), its title, and what to look for in it."""

    name: str
    title: str
    caption: str
    figure: Figure = field(compare=False)

    def svg(self) -> str:
        """An <svg> element for an HTML page: no ids shared with other plots, nothing that would be loaded."""
        from matplotlib import rc_context

        buffer = io.StringIO()
        with rc_context(STYLE | {"svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(href="#|url\(#)', rf"\g<1>{self.name}-", text)
        return text.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)

    def png(self) -> bytes:
        """On white, at 200 dots per inch, with its title, which a page has in its text."""
        from matplotlib import rc_context

        buffer = io.BytesIO()
        with rc_context(STYLE):
            title = self.figure.suptitle(self.title, fontsize=10)
            self.figure.savefig(buffer, format="png", dpi=200, facecolor="white")
            title.set_visible(False)
            title.set_in_layout(False)
        return buffer.getvalue()


def _axes(height: float, rows: int = 1) -> tuple[Figure, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, squeeze=False)[:, 0]


def bars(name: str, title: str, caption: str, values: dict[str, float], label: str) -> Plot:
    """A horizontal bar for each value, the largest on top."""
    from matplotlib import rc_context

    figure, (axes,) = _axes(0.8 + 0.32 * len(values))
    with rc_context(STYLE):
        names = list(values)[::-1]
        axes.barh([_short(n) for n in names], [values[n] for n in names], color=BLUE, height=0.7)
        axes.set_xlabel(label)
        axes.margins(y=0.02)
    return Plot(name, title, caption, figure)


def heat_map(
    name: str,
    title: str,
    caption: str,
    cells: dict[tuple[int, str], float],
    label: str,
    *,
    log: bool = False,
    bad_is_high: bool = False,
) -> Plot:
    """Depth from left to right, types of layers from top to bottom, both in the order in which they come."""
    from matplotlib import rc_context
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    depths = sorted({depth for depth, _ in cells})
    types = list(dict.fromkeys(kind for _, kind in cells))
    grid = [[cells.get((depth, kind), float("nan")) for depth in depths] for kind in types]
    figure, (axes,) = _axes(1.0 + 0.3 * max(len(types), 3))
    low, high = min(cells.values()), max(cells.values())
    norm: Normalize = LogNorm(low, max(high, 2 * low)) if log else Normalize(min(low, high - LEAST_SPAN), high)
    with rc_context(STYLE):
        edges = [depths[0] - 0.5, *(depth + 0.5 for depth in depths)]
        rows = [i - 0.5 for i in range(len(types) + 1)]
        mesh = axes.pcolormesh(edges, rows, grid, cmap="viridis_r" if bad_is_high else "viridis", norm=norm)
        axes.set_yticks(range(len(types)), [_short(kind) for kind in types])
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("depth (number of the block)")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=14)
        bar.set_label(label)
        if log:
            bar.set_ticks(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            bar.minorticks_off()
        bar.outline.set_visible(False)
    return Plot(name, title, caption, figure)


def channels(
    name: str, title: str, caption: str, layers: Sequence[tuple[str, list[float], float]], of: str = "input"
) -> Plot:
    """(title, absolute maximum of each channel, their median), one below the other; bins keep their largest value."""
    from matplotlib import rc_context
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, every = _axes(0.5 + 1.25 * len(layers), len(layers))
    with rc_context(STYLE):
        for axes, (what, amax, median) in zip(every, layers, strict=True):
            step = -(-len(amax) // MOST_POINTS)
            axes.semilogy(
                range(0, len(amax), step),
                [max(amax[i : i + step]) for i in range(0, len(amax), step)],
                color=BLUE, linewidth=0.8,
            )  # fmt: skip
            axes.axhline(median, color=ORANGE, linewidth=1.2, linestyle="--")
            axes.set_title(_short(what, 60))
            axes.set_ylabel("|x| max")
            axes.yaxis.set_major_locator(LogLocator(numticks=4))
            axes.yaxis.set_minor_formatter(NullFormatter())
        every[-1].set_xlabel(f"{of} channel; dashed: the median channel")
    return Plot(name, title, caption, figure)


def dots(name: str, title: str, caption: str, values: Sequence[float], labels: tuple[str, str]) -> Plot:
    """A value for each of many things in order, and their mean."""
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _axes(2.0)
    with rc_context(STYLE):
        axes.plot(range(len(values)), values, ".", color=BLUE, markersize=4)
        axes.axhline(sum(values) / len(values), color=ORANGE, linewidth=1.2, linestyle="--")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
    return Plot(name, title, caption, figure)


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
