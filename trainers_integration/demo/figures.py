"""The pictures of a run, from its recorded numbers alone. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .recorder import Row, percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUN, CONTROL, IN_FLIGHT, EXACT = "#2563a8", "#9a9a9a", "#d9822b", "#2e8b57"
INK, GRID = "#333333", "#e4e4e4"
#: Colours of weight versions, told apart by eye when they stand next to each other (Okabe and Ito).
VERSIONS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a5bb5", "#b8a200"),
    *("#332288", "#882255", "#44aa99", "#a0522d"),
)
WAITING, IDLE = "#d4d4d4", "#f5efe6"


def new_figure(height: float, *, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.grid(True, axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9)
    return figure, list(axes)


def set_title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK)


def _phase(rows: Sequence[Row], phase: str) -> list[Row]:
    return [row for row in rows if row["phase"] == phase and row["step"] > 0]


def _column(rows: Sequence[Row], name: str, scale: float = 1.0) -> list[float]:
    return [row[name] * scale for row in rows]


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """Centred moving average; the window shrinks at both ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def learning_curve(rows: Sequence[Row]) -> Figure:
    """Pass rate and reward over steps, the control beside the run."""
    figure, (left, right) = new_figure(4.2, columns=2)
    for phase, color, label in (
        ("control", CONTROL, "weights never synced"),
        ("train", RUN, "this run"),
    ):
        steps = _phase(rows, phase)
        if not steps:
            continue
        x = _column(steps, "step")
        for ax, name in ((left, "pass_rate"), (right, "reward")):
            values = _column(steps, name)
            ax.plot(x, values, color=color, alpha=0.25, linewidth=1)
            ax.plot(x, _smooth(values), color=color, linewidth=2, label=f"{label}, batches")
        measured = [r for r in rows if r["phase"] == phase and r["heldout_pass_rate"] is not None]
        points = _column(measured, "step"), _column(measured, "heldout_pass_rate")
        left.plot(
            *points,
            "o",
            color=color,
            markersize=6,
            markeredgecolor="white",
            label=f"{label}, held-out",
        )
        left.annotate(
            f"{points[1][-1]:.2f}",
            (points[0][-1], points[1][-1]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=9,
            color=color,
        )
    for ax, title in ((left, "Sampled pass rate"), (right, "Mean reward (with partial credit)")):
        set_title(ax, title)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("step")
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def logprob_gap(rows: Sequence[Row]) -> Figure:
    """How far the engine's log-probabilities of sampled tokens are from the trainer's, per step."""
    figure, (ax,) = new_figure(4.0)
    is_async = any(row["staleness"] > 0 for row in _phase(rows, "train"))
    names = {
        "control": (CONTROL, "control: weights never synced"),
        "train": (RUN, "this run, all versions" if is_async else "this run"),
        "in_flight": (IN_FLIGHT, "weights change under running requests, all versions"),
    }
    for phase, (color, label) in names.items():
        steps = _phase(rows, phase)
        if not steps:
            continue
        x = _column(steps, "step")
        floor = 1e-9  # a gap of zero has no place on a log axis
        ax.plot(
            x,
            [max(floor, v) for v in _column(steps, "logprob_gap_max")],
            color=color,
            label=f"{label}, largest",
        )
        ax.plot(
            x,
            [max(floor, v) for v in _column(steps, "logprob_gap_mean")],
            color=color,
            linestyle=":",
            label=f"{label}, mean",
        )
    own = [
        (row["step"], max(1e-9, row["logprob_gap_own_max"]))
        for row in [*_phase(rows, "train"), *_phase(rows, "in_flight")]
        if row["logprob_gap_own_max"] not in (None, row["logprob_gap_max"])
    ]
    if own:  # The promise is about these; the others are of earlier versions.
        label = "completions that the trainer's own version sampled, largest"
        ax.plot(*zip(*own, strict=True), "o", color=EXACT, markersize=4, label=label)
    ax.axhspan(1e-7, 1e-4, color=EXACT, alpha=0.08, linewidth=0)
    ax.text(
        0.4,
        7e-5,
        "float32 rounding",
        transform=ax.get_yaxis_transform(),
        va="top",
        fontsize=9,
        color=EXACT,
    )
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("|trainer − engine|, nats")
    set_title(ax, "Log-probability gap over sampled tokens, before each update")
    ax.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def sync_times(rows: Sequence[Row]) -> Figure:
    """Duration of each weight update and of the pause in it, with medians."""
    figure, (ax,) = new_figure(3.4)
    flight = _phase(rows, "in_flight")
    syncs = [
        (row["step"], sync) for row in [*_phase(rows, "train"), *flight] for sync in row["syncs"]
    ]
    x = [step for step, _ in syncs]
    for name, color, label in (
        ("sync_s", RUN, "sync: pack, stage, commit, verify"),
        ("pause_s", IN_FLIGHT, "of that, generation stood still"),
    ):
        values = [sync[name] * 1e3 for _, sync in syncs]
        median = percentile(values, 0.5)
        ax.axhline(median, color=color, linewidth=1, alpha=0.5)
        ax.plot(
            x, values, "o", markersize=3, color=color, label=f"{label} (median {median:.1f} ms)"
        )
    if flight:
        start, end = flight[0]["step"] - 0.5, flight[-1]["step"] + 0.5
        label = "requests were running"
        ax.axvspan(start, end, color=IN_FLIGHT, alpha=0.15, linewidth=0, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("step")
    ax.set_ylabel("milliseconds")
    set_title(ax, "Weight sync")
    ax.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure
