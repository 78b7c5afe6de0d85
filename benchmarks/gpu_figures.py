"""The pictures of results on GPUs: numbers of a file, caption and marks to a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .drawing import INK, OURS, QUIET, Marks, bars, marked, new_figure, new_row, title
from .gpu import PEER_RATIO
from .gpu_sync import Line, experts_limit, host_lines, update_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gpu_generate(numbers: dict[str, Any], caption: str, _marks: Marks | None) -> Figure:
    """Decode steps beside their floors, and rates."""
    figure, (left, right) = new_row((3, 2), 3.6, caption)
    _decode(left, numbers["decode"], "weights and KV read once")
    title(left, f"A decode step of {numbers.get('model', 'the model')}")
    rates = {"prefill: prompts": numbers["prefill"], "RL shape: outputs": numbers["rl"]}
    rows = [(name, rate["tokens_per_s"], OURS) for name, rate in rates.items()]
    bars(right, rows, digits=0)
    right.set_xlabel("tokens/s")
    title(right, "Rates")
    return figure


def gpu_experts(numbers: dict[str, Any], caption: str, _marks: Marks | None) -> Figure:
    """Decode steps beside their floors, and the kernels alone where they were measured."""
    kernels = numbers["kernels"]
    figure, panels = new_row((3, 2) if kernels else (1,), 3.6, caption)
    _decode(panels[0], numbers["decode"], "experts, other weights and KV read once")
    rate = numbers["prefill"]["tokens_per_s"]
    title(panels[0], f"A decode step of a mixture; prefill: {rate:,.0f} tokens/s")
    if kernels:
        rows = [
            (f"{size} tokens", 100 * found["floor_us"]["all"] / found["us"]["all"], OURS)
            for size, found in kernels.items()
        ]
        bars(panels[1], rows, digits=0)
        panels[1].set_xlabel("floor in % of what was measured")
        title(panels[1], "The kernels of a layer's experts")
    return figure


def gpu_sync(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    """A row for each model: updates on the GPU, and what passes through the host; then experts beside dense."""
    models = numbers["models"]
    aside = {name: list(host_lines(found)) for name, found in models.items()}
    rows = [[name, f"{name}, host" if aside[name] else name] for name in models]
    rows += [["experts", "experts"]] if "experts" in numbers else []
    figure, panels = new_figure(rows, (1, 1), 4.2 * len(rows), caption)
    for name, found in models.items():
        ax = panels[name]
        _lines(ax, update_lines(found))
        ax.set_xlabel("median ms; thin: floor (copies and reads)")
        size = f"{found['num_bytes'] / 1e9:.1f} GB in {found['num_tensors']} tensors"
        title(ax, f"Update of {size}, on one GPU")
        if aside[name]:
            ax = panels[f"{name}, host"]
            _lines(ax, aside[name])
            ax.set_xlabel("median ms; thin: floor (link to the host)")
            title(ax, "Trainer on the CPU; memory given back")
    if "experts" in numbers:
        _experts(panels["experts"], numbers["experts"], marks)
    return figure


def gpu(numbers: dict[str, Any], caption: str, marks: Marks | None) -> Figure:
    """Each way beside a copy from GPU to GPU."""
    parts = {
        "begin_to_verified": "Begin to verified",
        "publish": "The whole call, with packing",
        "pause": "Generation stands still",
    }
    names = {"two_buckets": "two buckets in turn", "nccl": "NCCL"}
    figure, panels = new_row((1,) * len(parts), 3.7, caption)
    seconds = numbers["seconds"]
    copy = seconds["copy"]["publish"]["p50"] * 1e3
    for ax, (part, words) in zip(panels, parts.items(), strict=True):
        rows = [("a copy from GPU to GPU", copy, QUIET)]
        rows += [
            (names.get(way, way.replace("_", " ")), found[part]["p50"] * 1e3, OURS)
            for way, found in seconds.items()
            if way != "copy"
        ]
        held = part == "begin_to_verified" and "peer_reads" in seconds
        targets = {"peer reads": PEER_RATIO * copy} if held else {}
        bars(ax, rows, digits=1, targets=targets, marks=marks)
        ax.set_xlabel(marked("median ms", marks if held else None, f"{PEER_RATIO:g} copies"))
        title(ax, words)
    for ax in panels[1:]:
        ax.sharey(panels[0])
        ax.tick_params(labelleft=False)
    widest = max(ax.get_xlim()[1] for ax in panels)
    for ax in panels:
        ax.set_xlim(0, widest)
    size = f"{numbers['num_bytes'] / 1e9:.2f} GB in {numbers['num_tensors']} tensors"
    words = f"Update of {size}, from GPU to GPU"
    figure.suptitle(words, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def _decode(ax: Axes, decode: Mapping[Any, Mapping[str, float]], floor: str) -> None:
    _beside(ax, ((f"batch {n}", step["p50_ms"], step["floor_ms"]) for n, step in decode.items()), 2)
    ax.set_xlabel(f"median ms a step; thin: floor ({floor})")


def _lines(ax: Axes, lines: Iterable[Line]) -> None:
    """Seconds as milliseconds."""
    in_ms = (
        (words, value["p50"] * 1e3, None if floor is None else floor * 1e3)
        for words, value, floor in lines
    )
    _beside(ax, in_ms)


def _beside(ax: Axes, rows: Iterable[tuple[str, float, float | None]], digits: int = 1) -> None:
    """What was measured, and its floor where there is one."""
    rows = list(rows)
    floors = {name: floor for name, _, floor in rows if floor is not None}
    bars(ax, [(name, value, OURS) for name, value, _ in rows], digits=digits, floors=floors)


def _experts(ax: Axes, numbers: dict[str, Any], marks: Marks | None) -> None:
    dense, experts = numbers["dense"], numbers["experts"]
    parts = {
        "pack": "pack, with fingerprints",
        "begin_to_committed": "begin to committed, copies queued",
        "begin_to_verified": "begin to verified",
        "pause": "of it, generation stands still",
        "publish": "the whole call",
    }
    bars(
        ax,
        [(words, experts[part]["p50"] * 1e3, OURS) for part, words in parts.items()],
        digits=1,
        targets={parts["publish"]: experts_limit(dense["publish"]["p50"]) * 1e3},
        marks=marks,
        floors={words: dense[part]["p50"] * 1e3 for part, words in parts.items()},
    )
    dense_words = f"median ms; thin: the same bytes in {dense['num_tensors']:,} dense tensors"
    ax.set_xlabel(marked(dense_words, marks, "1.5 times those and 10 ms"))
    size = f"{experts['num_bytes'] / 1e9:.1f} GB"
    title(ax, f"Update of {size} in {experts['num_tensors']:,} expert tensors, on one GPU")
