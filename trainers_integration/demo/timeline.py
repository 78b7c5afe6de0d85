"""The timeline of requests: one row per request, time on x, coloured by the weight version of each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import INK, VERSIONS, WAITING, new_figure, set_title
from .recorder import percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Request = Mapping[str, Any]

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
    shown = evenly(overview, OVERVIEW_ROWS)
    _draw_rows(above, shown, commits, zero=time, scale=1.0, ticks=False)
    above.set_xlim(first - time, last - time)
    above.set_xlabel("seconds")
    above.set_ylabel(f"{len(shown)} of {len(overview):,} requests")
    _add_legend(above, shown)
    set_title(above, title)

    met = _between(requests, time, time)
    # Wide enough to see such requests begin and end.
    reach = 1.5 * percentile([r["token_times"][-1] - r["arrived_at"] for r in met], 0.5) or 0.02
    shown = evenly(_between(requests, time - reach, time + reach), CLOSE_UP_ROWS)
    _draw_rows(below, shown, commits, zero=time, scale=1e3, ticks=True)
    below.set_xlim(-reach * 1e3, reach * 1e3)
    below.set_xlabel(
        f"milliseconds before and after the commit of version {commits[index]['version']}"
    )
    below.set_ylabel(f"{len(shown)} requests")
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
            begin = times[start - 1] if start else times[0]
            ax.barh(
                row,
                times[stop - 1] - begin,
                left=begin,
                height=0.86,
                color=color_of(version),
                linewidth=0,
            )
        if ticks:
            ax.plot(
                times, [row] * len(times), "|", color="white", markersize=4, markeredgewidth=0.8
            )
    ax.set_ylim(len(requests) - 0.3, -0.7)


def _add_legend(ax: Axes, requests: Sequence[Request]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    versions = sorted({version for request in requests for version, _, _ in request["versions"]})
    handles: list[Any] = [Patch(color=color_of(v), label=f"version {v}") for v in versions]
    handles += [
        Patch(color=WAITING, label="waiting, prompt"),
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


def color_of(version: int) -> str:
    """One colour per version; it comes again after `len(VERSIONS)` versions."""
    return VERSIONS[version % len(VERSIONS)]


def busiest_commit(requests: Sequence[Request], commits: Sequence[Mapping[str, Any]]) -> int:
    """Index of the commit under which most requests went on; if any, one with a few others on both sides."""
    met = Counter(version for r in requests for version, start, _ in r["versions"] if start > 0)
    last = len(commits) - OVERVIEW_COMMITS

    def rank(index: int) -> tuple[bool, int]:
        count = met[commits[index]["version"]]
        return (count > 0 and OVERVIEW_COMMITS <= index < last, count)

    return max(range(len(commits)), key=rank)


def evenly(requests: Sequence[Request], rows: int) -> list[Request]:
    """At most `rows` requests, evenly spread."""
    if len(requests) <= rows:
        return list(requests)
    return [requests[i * (len(requests) - 1) // (rows - 1)] for i in range(rows)]
