"""The pictures of results, from the numbers in their files alone. Each function returns a matplotlib figure.

python -m rollout_benchmarks.figures RESULT.json ...    draw the pictures beside these files again
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import GRID, INK, OURS, PEER, QUIET, Marks, bars, marked, new_row, title
from .gpu_figures import gpu, gpu_experts, gpu_generate, gpu_sync

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 0.02
"""Phases below this share of a run are drawn as one."""


def figure_of(result: dict[str, Any]) -> Figure:
    """The picture of a result file's content."""
    # Targets are for the sizes that a benchmark is made for.
    marks = Marks() if not result.get("quick", False) else None
    caption = f"{result['device']}, commit {result['commit']}"
    return DRAWN[result["benchmark"]](result["numbers"], caption, marks)


def _sync(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    large, small = numbers["large"], numbers["small"]
    figure, (left, right) = new_row((3, 2), 3.6, caption)
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
    bars(left, rows, digits=2, targets=targets, marks=marks)
    title(left, f"Update of {large['num_bytes'] / 1e9:.2f} GB in {large['num_tensors']} tensors")
    copy_ms = large["seconds"]["plain_copy"]["p50"] * 1e3
    copies_of = f"plain copies of the same bytes (1 = {copy_ms:.0f} ms); median"
    left.set_xlabel(marked(copies_of, marks, "at most"))
    num = small["num_tensors"]
    per = {name: value["p50"] * 1e6 / num for name, value in small["seconds"].items()}
    rows = [
        ("the whole call", per["publish"], OURS),
        ("pack", per["pack"], OURS),
        ("begin to verified", per["begin_to_verified"], OURS),
        ("usual way, unchecked", per["usual"], PEER),
    ]
    targets = {"the whole call": numbers["target_us_per_tensor"]}
    bars(right, rows, digits=1, targets=targets, marks=marks)
    title(right, f"{num:,} small tensors")
    right.set_xlabel("microseconds per tensor; median")
    return figure


def _group(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    engines = numbers["engines"]
    figure, panels = new_row((1,) * len(engines), 4.2, caption)
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
        bars(ax, rows, digits=0, targets=targets, marks=own)
        title(ax, f"{numbers['num_bytes'] / 1e9:.2f} GB over gloo to {tp_size} rank(s)")
        at_most = f"{numbers['target_copies']:g} copies or sockets"
        ax.set_xlabel(marked("median ms", marks, at_most))
    return figure


def _pause(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    figure, (left, right) = new_row((3, 2), 3.8, caption)
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
    title(left, "Tokens as a client sees them")
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
    bars(right, [(a, b * 1e3, c) for a, b, c in rows], digits=0, targets=targets, marks=marks)
    right.set_xlabel(marked("milliseconds", marks, "at most (step + 1.5 copies)"))
    title(right, f"{numbers['excess_s']['num']} updates under a stream")
    return figure


def _generate(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    figure, (left, right) = new_row((2, 3), 4.6, caption)
    rows = [("this engine", numbers["engine_tokens_per_s"]["p50"], OURS)]
    rows += [
        (f"transformers, batch {size}", peer["tokens_per_s"], PEER)
        for size, peer in numbers["transformers"].items()
    ]
    best = numbers["transformers"][str(numbers["transformers_best_batch"])]["tokens_per_s"]
    targets = {"this engine": best * numbers["target_ratio"]}
    own = None if marks is None else Marks(at_least=True)
    bars(left, rows, digits=0, targets=targets, marks=own)
    at_least = f"{numbers['target_ratio']:g} x the best peer"
    left.set_xlabel(marked("useful output tokens/s", marks, at_least))
    title(left, f"{numbers['ratio']:.1f} x transformers")
    profile = numbers["profile"]
    shares = {name: phase["share"] * 100 for name, phase in profile["phases"].items()}
    large = {name: share for name, share in shares.items() if share >= _FEW * 100}
    rows = [(name, share, OURS) for name, share in large.items()]
    rows.append(("everything else", 100 - sum(large.values()), PEER))
    bars(right, rows, digits=1)
    right.set_xlabel(
        f"% of a run; matrix products at {profile['matrix_products_gflops_per_s']:.0f} of "
        f"{profile['best_gflops_per_s']:.0f} GFLOP/s"
    )
    title(right, "Where the engine's time goes")
    return figure


DRAWN: dict[str, Callable[[dict[str, Any], str, Marks | None], Figure]] = {
    "sync": _sync,
    "pause": _pause,
    "generate": _generate,
    "group": _group,
    "gpu": gpu,
    "gpu-sync": gpu_sync,
    "gpu-generate": gpu_generate,
    "gpu-experts": gpu_experts,
}
"""By benchmark: numbers, caption and marks to a picture."""


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        figure_of(json.loads(path.read_text(encoding="utf-8"))).savefig(path.with_suffix(".png"))
