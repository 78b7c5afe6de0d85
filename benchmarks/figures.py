"""The pictures of results, from the numbers in their files alone. Each function returns a matplotlib figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEER, TARGET, QUIET = "#2563a8", "#9a9a9a", "#c2410c", "#7fb069"
INK, GRID = "#333333", "#e4e4e4"
_FEW = 0.02
"""Phases below this share of a run are drawn as one."""


def figure_of(result: dict[str, Any]) -> Figure:
    """The picture of a result file's content."""
    drawn = {"sync": _sync, "pause": _pause, "generate": _generate, "group": _group}
    draw = drawn[result["benchmark"]]
    # Targets are for the sizes that a benchmark is made for.
    marks = Marks() if not result.get("quick", False) else None
    return draw(result["numbers"], f"{result['device']}, commit {result['commit']}", marks)


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


def _marked(text: str, marks: Marks | None, what: str) -> str:
    """The label of an axis, with what its marks mean where there are any."""
    return text if marks is None else f"{text}; mark: {what}"


def _new(widths: tuple[float, ...], height: float, caption: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9)
    figure.supxlabel(caption, fontsize=8, color="#777777", x=0.99, ha="right")
    return figure, list(axes)


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def _bars(
    ax: Axes,
    rows: list[tuple[str, float, str]],
    *,
    digits: int,
    targets: dict[str, float],
    marks: Marks | None,
) -> None:
    """Horizontal bars, first row on top: label, value, colour; a mark where a target is, a word where it is missed."""
    if marks is None:
        targets = {}
    names = [name for name, _, _ in rows]
    ax.barh(names, [value for _, value, _ in rows], color=[c for _, _, c in rows], height=0.62)
    ax.invert_yaxis()
    ax.grid(True, axis="x", color=GRID, linewidth=0.8)
    ax.tick_params(axis="y", length=0)
    most = max([value for _, value, _ in rows] + list(targets.values()))
    ax.set_xlim(0, most * 1.28)
    for at, (name, value, _) in enumerate(rows):
        label_at, target = value, targets.get(name)
        if target is not None:
            ax.plot([target] * 2, [at - 0.4, at + 0.4], color=TARGET, linewidth=2)
            if value <= target < value + most * 0.12:  # the number would be struck through
                label_at = target
        missed = target is not None and marks is not None and marks.missed(value, target)
        text = f"{value:,.{digits}f}" + (" missed" if missed else "")
        color = TARGET if missed else INK
        ax.text(label_at + most * 0.012, at, text, va="center", fontsize=9, color=color)


def _sync(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    large, small = numbers["large"], numbers["small"]
    figure, (left, right) = _new((3, 2), 3.6, caption)
    copies = {name: value["p50"] for name, value in large["plain_copies"].items()}
    words = {
        "pack": "pack, with fingerprints",
        "begin_to_committed": "begin to committed",
        "begin_to_verified": "begin to verified",
        "publish": "the whole call",
        "pause": "of it, generation stands still",
        "usual": "usual way, unchecked",
    }
    rows = [(text, copies[name], PEER if name == "usual" else OURS) for name, text in words.items()]
    targets = {words[name]: value for name, value in numbers["targets_in_plain_copies"].items()}
    _bars(left, rows, digits=2, targets=targets, marks=marks)
    _title(left, f"Update of {large['num_bytes'] / 1e9:.2f} GB in {large['num_tensors']} tensors")
    copy_ms = large["seconds"]["plain_copy"]["p50"] * 1e3
    copies_of = f"plain copies of the same bytes (1 = {copy_ms:.0f} ms); median"
    left.set_xlabel(_marked(copies_of, marks, "at most"))
    num = small["num_tensors"]
    per = {name: value["p50"] * 1e6 / num for name, value in small["seconds"].items()}
    rows = [
        ("the whole call", per["publish"], OURS),
        ("pack", per["pack"], OURS),
        ("begin to verified", per["begin_to_verified"], OURS),
        ("usual way, unchecked", per["usual"], PEER),
    ]
    targets = {"the whole call": numbers["target_us_per_tensor"]}
    _bars(right, rows, digits=1, targets=targets, marks=marks)
    _title(right, f"{num:,} small tensors")
    right.set_xlabel("microseconds per tensor; median")
    return figure


def _group(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    engines = numbers["engines"]
    figure, panels = _new((1,) * len(engines), 4.2, caption)
    words = {
        "plain_copy": "plain copy",
        "loopback": "bytes over plain sockets",
        "group_alone": "the broadcast alone",
        "begin_to_committed": "begin to committed",
        "begin_to_verified": "begin to verified",
        "publish": "the whole call, with packing",
        "each": "gloo, tensor by tensor, unchecked",
        "flat": "gloo, one flat tensor, unchecked",
    }
    floors, peers = ("plain_copy", "loopback"), ("each", "flat")
    for ax, (tp_size, engine) in zip(panels, engines.items(), strict=True):
        seconds = {
            name: engine["seconds"][name]["p50"] * 1e3
            for name in words
            if name in engine["seconds"]
        }
        rows = [
            (words[name], value, QUIET if name in floors else PEER if name in peers else OURS)
            for name, value in seconds.items()
        ]
        bound = engine["seconds"]["bound"]["p50"] * 1e3
        held = ("group_alone", "begin_to_committed", "begin_to_verified")
        targets = {words[name]: bound for name in held if name in seconds}
        # What is promised is promised for one rank.
        own = None if marks is None else Marks(judged=tp_size == "1")
        _bars(ax, rows, digits=0, targets=targets, marks=own)
        _title(ax, f"{numbers['num_bytes'] / 1e9:.2f} GB over gloo to {tp_size} rank(s)")
        at_most = f"{numbers['target_copies']:g} copies or sockets"
        ax.set_xlabel(_marked("median ms", marks, at_most))
    return figure


def _pause(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    figure, (left, right) = _new((3, 2), 3.8, caption)
    series = numbers["series"]
    for start, end in series["updates"]:
        left.axvspan(start, end, color=OURS, alpha=0.18, linewidth=0)
    gaps = series["gaps"]
    left.plot(
        [end for end, _ in gaps],
        [length * 1e3 for _, length in gaps],
        ".",
        color=INK,
        markersize=3,
        alpha=0.6,
    )
    left.grid(True, axis="y", color=GRID, linewidth=0.8)
    left.set_ylim(bottom=0)
    left.set_xlabel("seconds; shaded: an update is under way")
    left.set_ylabel("ms since the token before")
    _title(left, "Tokens as a client sees them")
    rows = [
        ("one decode step", numbers["decode_step_s"]["p50"], QUIET),
        ("plain copy of the model", numbers["plain_copy_s"]["p50"], QUIET),
        ("longest gap, no update", numbers["worst_gap_without_s"]["p50"], PEER),
        ("longest gap, update", numbers["worst_gap_with_update_s"]["p50"], OURS),
        ("difference, median", numbers["excess_s"]["p50"], OURS),
        ("difference, p90", numbers["excess_s"]["p90"], OURS),
        ("engine's pause", numbers["engine"]["pause_s"]["p50"], OURS),
    ]
    limit = numbers["limit_s"] * 1e3
    targets = {"difference, median": limit, "difference, p90": limit}
    _bars(right, [(a, b * 1e3, c) for a, b, c in rows], digits=0, targets=targets, marks=marks)
    right.set_xlabel(_marked("milliseconds", marks, "at most (step + 1.5 copies)"))
    _title(right, f"{numbers['excess_s']['num']} updates under a stream")
    return figure


def _generate(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    figure, (left, right) = _new((2, 3), 4.6, caption)
    rows = [("this engine", numbers["engine_tokens_per_s"]["p50"], OURS)]
    rows += [
        (f"transformers, batch {size}", peer["tokens_per_s"], PEER)
        for size, peer in numbers["transformers"].items()
    ]
    best = numbers["transformers"][str(numbers["transformers_best_batch"])]["tokens_per_s"]
    targets = {"this engine": best * numbers["target_ratio"]}
    own = None if marks is None else Marks(at_least=True)
    _bars(left, rows, digits=0, targets=targets, marks=own)
    at_least = f"{numbers['target_ratio']:g} x the best peer"
    left.set_xlabel(_marked("useful output tokens/s", marks, at_least))
    _title(left, f"{numbers['ratio']:.1f} x transformers")
    profile = numbers["profile"]
    shares = {name: phase["share"] * 100 for name, phase in profile["phases"].items()}
    large = {name: share for name, share in shares.items() if share >= _FEW * 100}
    rows = [(name, share, OURS) for name, share in large.items()]
    rows.append(("everything else", 100 - sum(large.values()), PEER))
    _bars(right, rows, digits=1, targets={}, marks=None)
    right.set_xlabel(
        f"% of a run; matrix products at {profile['matrix_products_gflops_per_s']:.0f} of "
        f"{profile['best_gflops_per_s']:.0f} GFLOP/s"
    )
    _title(right, "Where the engine's time goes")
    return figure
