"""The timeline of requests: one row per request, time on x, coloured by the weight version of each token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .figures import IDLE, INK, VERSIONS, WAITING, new_figure, set_title
from .recorder import percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Request = Mapping[str, Any]
T = TypeVar("T")

#: The overview: so many commits before and after the one in the middle, and no more rows than there are pixels.
OVERVIEW_COMMITS, OVERVIEW_ROWS = 4, 160
#: The close-up has room for the requests that met that commit.
CLOSE_UP_ROWS = 64


def draw_timeline(timeline: Mapping[str, Any], title: str) -> Figure:
    """Requests in the order in which they began to run, around the commit that most of them lived through."""
    figure, (above, below) = new_figure(8.6, rows=2)
    requests = sorted(
        timeline["requests"], key=lambda r: (r["token_times"][0], r["token_times"][-1])
    )
    commits = timeline["commits"]
    index = busiest_commit(requests, commits)
    time = commits[index]["time"]
    first = commits[max(0, index - OVERVIEW_COMMITS)]["time"]
    last = commits[min(len(commits) - 1, index + OVERVIEW_COMMITS)]["time"]
    overview = _between(requests, first, last)
    shown = covering(overview, OVERVIEW_ROWS)
    first = max(first, min((r["arrived_at"] for r in overview), default=first))
    last = min(last, max((r["token_times"][-1] for r in overview), default=last))
    colors = colors_of(versions_between(shown, first, last), {})
    _draw_rows(above, shown, commits, colors, zero=time, scale=1.0, ticks=False)
    _shade(above, overview, zero=time, scale=1.0)
    above.set_xlim(first - time, last - time)
    above.set_xlabel("seconds before and after the commit below")
    above.set_ylabel(f"{len(shown)} of {len(overview):,} requests")
    _add_legend(above, colors)
    set_title(above, title)

    met = _between(requests, time, time)
    # Wide enough to see such requests begin and end.
    reach = 1.5 * percentile([r["token_times"][-1] - r["arrived_at"] for r in met], 0.5) or 0.02
    near = _between(requests, time - reach, time + reach)
    shown = covering(near, CLOSE_UP_ROWS)
    new = versions_between(shown, time - reach, time + reach)
    closer = colors | colors_of(new - colors.keys(), colors)
    _draw_rows(below, shown, commits, closer, zero=time, scale=1e3, ticks=True)
    _shade(below, near, zero=time, scale=1e3)
    below.set_xlim(-reach * 1e3, reach * 1e3)
    below.set_xlabel(
        f"milliseconds before and after the commit of version {commits[index]['version']}"
    )
    below.set_ylabel(f"{len(shown)} of {len(near):,} requests")
    set_title(
        below, "Close-up: requests that run go on with their next token under the new version"
    )
    return figure


def _between(requests: Sequence[Request], start: float, end: float) -> list[Request]:
    """Requests that were in the engine at some time from `start` to `end`."""
    return [r for r in requests if r["arrived_at"] <= end and r["token_times"][-1] >= start]


def _draw_rows(
    ax: Axes,
    requests: Sequence[Request],
    commits: Sequence[Mapping[str, Any]],
    colors: Mapping[int, str],
    *,
    zero: float,
    scale: float,
    ticks: bool,
) -> None:
    """One row per request; x is (time - zero) * scale; `ticks` marks each token."""
    ax.set_yticks([])
    ax.grid(False)
    if not requests:
        ax.text(0.5, 0.5, "no request was running then", transform=ax.transAxes, ha="center")
        return
    last = max(request["token_times"][-1] for request in requests)
    first = min(request["arrived_at"] for request in requests)
    for commit in commits:
        if first <= commit["time"] <= last:
            ax.axvline(
                (commit["time"] - zero) * scale,
                color=INK,
                linewidth=1,
                linestyle=(0, (4, 2)),
                zorder=3,
            )
    for row, request in enumerate(requests):
        times = [(time - zero) * scale for time in request["token_times"]]
        arrived = (request["arrived_at"] - zero) * scale
        ax.barh(row, times[0] - arrived, left=arrived, height=0.3, color=WAITING, linewidth=0)
        for version, start, stop in request["versions"]:
            if version not in colors:  # It is out of the picture.
                continue
            begin = times[start - 1] if start else times[0]
            ax.barh(
                row,
                times[stop - 1] - begin,
                left=begin,
                height=0.86,
                color=colors[version],
                linewidth=0,
            )
        if ticks:
            ax.plot(
                times, [row] * len(times), "|", color="white", markersize=4, markeredgewidth=0.8
            )
    ax.set_ylim(len(requests) - 0.3, -0.7)


def _shade(ax: Axes, requests: Sequence[Request], *, zero: float, scale: float) -> None:
    """Mark the times without a request, of all that there were."""
    for start, end in idle_times(requests):
        ax.axvspan((start - zero) * scale, (end - zero) * scale, color=IDLE, linewidth=0, zorder=0)


def idle_times(requests: Sequence[Request]) -> list[tuple[float, float]]:
    """From when to when none of these requests was in the engine, between the first and the last."""
    found: list[tuple[float, float]] = []
    end = math.inf
    for request in sorted(requests, key=lambda r: r["arrived_at"]):
        if request["arrived_at"] > end:
            found.append((end, request["arrived_at"]))
        end = max(request["token_times"][-1], -math.inf if end == math.inf else end)
    return found


def _add_legend(ax: Axes, colors: Mapping[int, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=c, label=f"version {v}") for v, c in sorted(colors.items())]
    handles += [
        Patch(color=WAITING, label="waiting, prompt"),
        Patch(color=IDLE, label="no request in the engine"),
        Line2D([], [], color=INK, linestyle=(0, (4, 2)), label="commit of new weights"),
    ]
    ax.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        ncols=6,
        columnspacing=1.2,
        handlelength=1.4,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
    )


def versions_between(requests: Sequence[Request], start: float, end: float) -> set[int]:
    """Versions that sampled a token of these requests from `start` to `end`."""
    return {
        version
        for request in requests
        for version, first, stop in request["versions"]
        if any(start <= time <= end for time in request["token_times"][first:stop])
    }


def colors_of(versions: Collection[int], taken: Mapping[int, str]) -> dict[int, str]:
    """A colour of its own for each of these versions, and none of those that are `taken`."""
    from matplotlib.colors import to_hex

    free = [color for color in VERSIONS if color not in taken.values()]
    turn = 0
    while len(free) < len(versions):  # around the wheel by the golden angle, darker each time
        color = to_hex(_wheel(0.618034 * turn % 1.0, 0.85 * 0.985**turn))
        turn += 1
        if color not in free and color not in taken.values():
            free.append(color)
    return dict(zip(sorted(versions), free, strict=False))


def _wheel(hue: float, value: float) -> tuple[float, float, float]:
    import colorsys

    return colorsys.hsv_to_rgb(hue, 0.85, value)


def busiest_commit(requests: Sequence[Request], commits: Sequence[Mapping[str, Any]]) -> int:
    """Index of the commit under which most requests went on; if any, one with a few others on both sides."""
    met = Counter(version for r in requests for version, start, _ in r["versions"] if start > 0)
    last = len(commits) - OVERVIEW_COMMITS

    def rank(index: int) -> tuple[bool, int]:
        count = met[commits[index]["version"]]
        return (count > 0 and OVERVIEW_COMMITS <= index < last, count)

    return max(range(len(commits)), key=rank)


def covering(requests: Sequence[Request], rows: int) -> list[Request]:
    """At most `rows` requests, in their order: those that together were in the engine whenever any of them was, and
    others evenly spread. So a gap in the picture is a time without requests, and not one without a row."""
    chosen: set[int] = set()
    end = float("-inf")
    by_arrival = sorted(range(len(requests)), key=lambda i: requests[i]["arrived_at"])
    position = 0
    while position < len(by_arrival):
        start = max(end, requests[by_arrival[position]]["arrived_at"])
        best = by_arrival[position]
        while position < len(by_arrival):
            i = by_arrival[position]
            if requests[i]["arrived_at"] > start:
                break
            if requests[i]["token_times"][-1] > requests[best]["token_times"][-1]:
                best = i
            position += 1
        if requests[best]["token_times"][-1] > end:
            chosen.add(best)
            end = requests[best]["token_times"][-1]
    if len(chosen) >= rows:  # As many as there is room for.
        return [requests[i] for i in evenly(sorted(chosen), rows)]
    rest = [i for i in range(len(requests)) if i not in chosen]
    chosen.update(evenly(rest, rows - len(chosen)))
    return [requests[i] for i in sorted(chosen)]


def evenly(items: Sequence[T], rows: int) -> list[T]:
    """At most `rows` of them, evenly spread."""
    if len(items) <= rows:
        return list(items)
    if rows < 2:
        return list(items[:rows])
    return [items[i * (len(items) - 1) // (rows - 1)] for i in range(rows)]
