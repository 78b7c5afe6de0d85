"""`rollout experts`: where the tokens of a running mixture of experts go, counted for a while, and a picture of it."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

EPILOG = """[bold]Examples[/bold]

  rollout experts ipc:///tmp/rollout-x1y2/socket --seconds 30

  rollout experts ADDRESS --out experts.png --counts counts.json

  rollout experts --from counts.json --out experts.png

In a program: start_, stop_ and dump_expert_distribution_record of an engine or a pool,
and rollout.cli.experts.draw_experts(counts, "experts.png"). While it counts, decode
steps on a GPU run without graphs. ADDRESS as for `rollout top`.
"""


def experts(
    address: Annotated[
        str | None,
        typer.Argument(
            envvar="ROLLOUT_ADDRESS", help="Address of an engine or a pool.", show_default=False
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to count.")] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the picture here (.png, .svg, .pdf)."),
    ] = None,
    counts_to: Annotated[
        Path | None,
        typer.Option("--counts", help="Write the counts here, as JSON: rows are layers."),
    ] = None,
    counts_from: Annotated[
        Path | None, typer.Option("--from", help="Draw these counts; nothing is asked.")
    ] = None,
) -> None:
    """Count how often tokens go to each expert of each layer; print how even that is, and draw it."""
    from rich.console import Console

    from ..errors import ConfigError

    if out is not None:
        _check_can_draw()
    if counts_from is not None:
        counts = _read(counts_from)
    elif address is not None:
        counts = _count(address, seconds)
    else:
        raise ConfigError(
            "rollout experts: got neither ADDRESS nor --from, expected an engine, or a file of counts; name one"
        )
    if counts_to is not None:
        counts_to.write_text(json.dumps(counts.tolist()) + "\n", encoding="utf-8")
    Console().print(_table(counts))
    if out is not None:
        draw_experts(counts, out)
        typer.echo(f"written: {out}")


def _read(path: Path) -> np.ndarray[Any, Any]:
    import numpy as np

    from ..errors import ConfigError

    try:
        counts = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.int64)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--from: cannot read {path}: {error}; expected a list of numbers for each layer, as --counts writes"
        ) from None
    return counts


def _count(address: str, seconds: float) -> np.ndarray[Any, Any]:
    from ..engine.engine import Engine
    from ..errors import ConfigError

    try:
        connected = Engine.connect(address, skip_tokenizer_init=True)
    except ValueError as error:  # what is no address, or no key
        raise ConfigError(f"ADDRESS: {error}") from None
    with connected as engine:
        engine.start_expert_distribution_record()
        try:
            time.sleep(seconds)
        finally:
            engine.stop_expert_distribution_record()
        counts: np.ndarray[Any, Any] = engine.dump_expert_distribution_record()
        return counts


def draw_experts(counts: np.ndarray[Any, Any], path: str | Path) -> None:
    """Write a heat map of `counts` (layers, experts), what `dump_expert_distribution_record` returns.

    A row is a layer, and colours are shares of its tokens: 1 is an even share. Layers without experts are left out.
    Raises `ConfigError` without matplotlib, and for counts of nothing.
    """
    _check_can_draw()
    layers, shares = _shares(counts)
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    num_layers, num_experts = shares.shape
    size = (min(14.0, 4.0 + num_experts / 12), min(12.0, 2.0 + num_layers / 6))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    heat, beside = figure.subplots(1, 2, width_ratios=(8, 1), sharey=True)
    colours = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, float(shares.max())))
    image = heat.imshow(shares, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=colours)
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    steps = range(0, num_layers, max(1, num_layers // 16))
    heat.set_yticks(list(steps), [str(layers[i]) for i in steps])
    heat.set_title(f"Where {int(counts.sum()):,} choices of tokens went", loc="left")
    figure.colorbar(image, ax=heat, label="share of an even one", location="bottom", shrink=0.6)
    beside.barh(range(num_layers), shares.max(1), color="#2563a8")
    beside.set_xlabel("busiest")
    beside.axvline(1.0, color="#999999", linewidth=0.8)
    beside.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _shares(counts: np.ndarray[Any, Any]) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Layers in which something was counted, and their experts' counts over an even one."""
    import numpy as np

    from ..errors import ConfigError

    if counts.ndim != 2 or not counts.any():
        raise ConfigError(
            f"counts: got {int(counts.sum())} choices in the shape {counts.shape}, expected some in (layers, experts); "
            "let the engine generate while it counts"
        )
    layers = np.flatnonzero(counts.any(1)).tolist()
    used = counts[layers]
    return layers, used / used.mean(1, keepdims=True)


def _table(counts: np.ndarray[Any, Any]) -> Table:
    from rich.table import Table

    layers, shares = _shares(counts)
    table = Table("layer", title=f"{int(counts.sum()):,} choices", title_justify="left")
    for column in ("busiest expert", "its share of an even one", "never chosen"):
        table.add_column(column, justify="right")
    for layer, row in zip(layers, shares, strict=True):
        unused = int((row == 0).sum())
        table.add_row(str(layer), str(int(row.argmax())), f"{row.max():.2f}", str(unused))
    return table


def _check_can_draw() -> None:
    from ..errors import ConfigError

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the picture needs matplotlib, which is not installed; pip install 'rollout-sync[demo]'"
        )
