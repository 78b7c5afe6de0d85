"""The timeline of requests: one row per request, time on x, coloured by the weight version of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import INK, VERSIONS, WAITING, new_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More rows would be thinner than a few pixels.
MAX_ROWS = 96


def draw_timeline(timeline: Mapping[str, Any], title: str) -> Figure:
    """A sample of the recorded requests in the order in which they began to run; commits are vertical lines."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, (ax,) = new_figure(5.6)
    shown = choose(timeline["requests"], MAX_ROWS)
    zero = min(request["arrived_at"] for request in shown)
    end = max(request["token_times"][-1] for request in shown)
    seen: set[int] = set()
    for row, request in enumerate(shown):
        times = request["token_times"]
        ax.hlines(row, request["arrived_at"] - zero, times[0] - zero, color=WAITING, linewidth=1)
        for version, start, stop in bars_of(request):
            seen.add(version)
            ax.barh(
                row,
                stop - start,
                left=start - zero,
                height=0.9,
                color=color_of(version),
                linewidth=0,
            )
        ax.plot(
            [t - zero for t in times],
            [row] * len(times),
            "|",
            color="white",
            markersize=2.2,
            markeredgewidth=0.6,
        )
    for commit in timeline["commits"]:
        if zero <= commit["time"] <= end:
            ax.axvline(commit["time"] - zero, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    ax.set_ylim(len(shown) - 0.3, -0.7)
    ax.set_xlim(left=0)
    ax.grid(False)
    ax.set_xlabel("seconds")
    ax.set_ylabel(f"{len(shown)} of {len(timeline['requests']):,} requests")
    set_title(ax, title)
    handles: list[Any] = [Patch(color=color_of(v), label=f"version {v}") for v in sorted(seen)]
    handles += [
        Line2D([], [], color=WAITING, label="waiting, prompt"),
        Line2D([], [], color=INK, linestyle=(0, (4, 2)), label="commit"),
    ]
    ax.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        ncols=6,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
    )
    return figure


def color_of(version: int) -> str:
    """One colour per version; it comes again after `len(VERSIONS)` versions."""
    return VERSIONS[version % len(VERSIONS)]


def bars_of(request: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """(version, start, end) of the stretches of time in which each version sampled tokens of this request.

    A token's stretch begins where the one before it ended; the first token has no length of its own, since what was
    before it is waiting and the prompt.
    """
    times = request["token_times"]
    return [
        (version, times[start - 1] if start else times[0], times[stop - 1])
        for version, start, stop in request["versions"]
    ]


def choose(requests: Sequence[Mapping[str, Any]], rows: int) -> list[Mapping[str, Any]]:
    """At most `rows` requests, evenly spread over the order in which they began to run."""
    ordered = sorted(requests, key=lambda r: (r["token_times"][0], r["token_times"][-1]))
    if len(ordered) <= rows:
        return ordered
    return [ordered[i * (len(ordered) - 1) // (rows - 1)] for i in range(rows)]
