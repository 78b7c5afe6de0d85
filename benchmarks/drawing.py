"""What the pictures of results share: palette, panels, bars, targets and floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEER, TARGET, QUIET = "#2563a8", "#9a9a9a", "#c2410c", "#7fb069"
INK, GRID = "#333333", "#e4e4e4"


@dataclass(frozen=True, slots=True)
class Marks:
    """How targets are drawn; None in its place: they are not."""

    at_least: bool = False
    """More is better; False: less is."""
    judged: bool = True
    """Say where one is missed."""

    def missed(self, value: float, target: float) -> bool:
        """Whether to say that `value` misses `target`."""
        return self.judged and (value < target if self.at_least else value > target)


def marked(text: str, marks: Marks | None, what: str) -> str:
    """The label of an axis, with what its marks mean where there are any."""
    return text if marks is None else f"{text}; mark: {what}"


def new_row(widths: tuple[float, ...], height: float, caption: str) -> tuple[Figure, list[Axes]]:
    """Panels side by side."""
    figure, axes = new_figure([[str(i) for i in range(len(widths))]], widths, height, caption)
    return figure, list(axes.values())


def new_figure(
    panels: Sequence[Sequence[str]], widths: tuple[float, ...], height: float, caption: str
) -> tuple[Figure, dict[str, Axes]]:
    """Rows of panels by key; a key that stands in two columns is one panel over both. `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), dpi=130, layout="constrained")
    mosaic = [list(row) for row in panels]
    axes: dict[str, Axes] = figure.subplot_mosaic(mosaic, width_ratios=widths)
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9)
    figure.supxlabel(caption, fontsize=8, color="#777777", x=0.99, ha="right")
    return figure, axes


def title(ax: Axes, text: str) -> None:
    """Above the panel, from its left edge."""
    ax.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def bars(
    ax: Axes,
    rows: list[tuple[str, float, str]],
    *,
    digits: int,
    targets: Mapping[str, float] = {},
    marks: Marks | None = None,
    floors: Mapping[str, float] = {},
) -> None:
    """Horizontal bars, first row on top: label, value, colour; a mark where a target is, a word where it is missed, a
    thin bar below for its floor."""
    if marks is None:
        targets = {}
    names = [name for name, _, _ in rows]
    most = max([value for _, value, _ in rows] + [*targets.values(), *floors.values()])
    height = 0.46 if floors else 0.62

    def say(text: str, end: float, at: float, size: float, ink: str = INK) -> None:
        points: Any = {"xytext": (4, 0), "textcoords": "offset points"}
        ax.annotate(text, (end, at), va="center", fontsize=size, color=ink, **points)

    for at, (name, value, color) in enumerate(rows):
        target, floor = targets.get(name), floors.get(name)
        place = at if floor is None else at - 0.13
        ax.barh(place, value, color=color, height=height)
        end = value
        if target is not None:
            half = height / 2 + 0.09
            ax.plot([target] * 2, [place - half, place + half], color=TARGET, linewidth=2)
            if value <= target < value + most * 0.12:  # the number would be struck through
                end = target
        missed = target is not None and marks is not None and marks.missed(value, target)
        words = " missed" if missed else ""
        say(_number(value, digits) + words, end, place, 9, TARGET if missed else INK)
        if floor is not None:
            ax.barh(at + 0.24, floor, color=QUIET, height=0.2)
            say(_number(floor, digits), floor, at + 0.24, 7.5)
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, most * 1.28)
    ax.grid(True, axis="x", color=GRID, linewidth=0.8)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_formatter("{x:,g}")


def _number(value: float, digits: int) -> str:
    """Three digits before the point need none behind it."""
    return f"{value:,.{0 if value >= 100 else digits}f}"
