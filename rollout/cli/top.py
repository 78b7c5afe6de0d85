"""`rollout top`: what an engine or a pool does now, looked at from outside and redrawn every second."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from ..protocol.commands import Status

EPILOG = """[bold]Examples[/bold]

  rollout top ipc:///tmp/rollout-x1y2/socket

  rollout top 'tcp://10.0.0.3:5555?key_file=/home/me/engine.key'

  rollout top ADDRESS --once --json

ADDRESS is `engine.address` or `pool.address`, or what `rollout serve` was told with
`--set engine.listen=ipc:///folder/socket`; a server's URL is none. One with a key is a password: other users see
arguments, so set ROLLOUT_ADDRESS or name a key file.
"""

_BAR = 24


def top(
    address: Annotated[
        str,
        typer.Argument(
            envvar="ROLLOUT_ADDRESS", help="Address of an engine or a pool.", show_default=False
        ),
    ],
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between looks, over which rates are taken.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once (twice, for the rates), and end.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, a line for each look.")
    ] = False,
) -> None:
    """Show requests, tokens per second, KV use, versions and the last weight updates, live; Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    from weight_sync.wire.keys import shown

    from ..engine.engine import Engine
    from ..errors import ConfigError

    try:
        connected = Engine.connect(address, skip_tokenizer_init=True)
    except ValueError as error:  # what is no address, or no key
        raise ConfigError(f"ADDRESS: {error}") from None
    with connected as engine:
        look = Look(shown(address), engine.status())
        if once or as_json:
            while True:
                time.sleep(interval)
                look = look.then(engine.status())
                if as_json:
                    typer.echo(json.dumps(look.facts()))
                else:
                    Console().print(look.picture())
                if once:
                    return
        with Live(look.picture(), auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(interval)
                    look = look.then(engine.status())
                    live.update(look.picture(), refresh=True)
            except KeyboardInterrupt:
                return


class Look:
    """A status, and how fast counts have grown since the one before."""

    def __init__(
        self, address: str, status: Status, before: Status | None = None, elapsed_s: float = 0.0
    ) -> None:
        self._address = address
        self._status = status
        self._at = time.monotonic()
        # Another life of the engine counts from zero.
        same = before is not None and before.engine_id == status.engine_id
        self._rates = {
            name: max(0, getattr(status, name) - getattr(before, name)) / elapsed_s
            if same and elapsed_s > 0
            else None
            for name in ("num_decoded_tokens", "num_prompt_tokens")
        }

    def then(self, status: Status) -> Look:
        """The next look."""
        return Look(self._address, status, self._status, time.monotonic() - self._at)

    def facts(self) -> dict[str, Any]:
        """Everything that the picture shows, for programs; rates are tokens per second, or null at first."""
        status = self._status
        return {
            "address": self._address,
            "pid": status.pid,
            "model_path": status.resolved.get("model_path"),
            "weight_version": status.weight_version,
            "version": status.version,
            "state": self._state,
            "num_running": status.num_running,
            "num_waiting": status.num_waiting,
            "decoded_tokens_per_s": self._rates["num_decoded_tokens"],
            "prompt_tokens_per_s": self._rates["num_prompt_tokens"],
            "num_decoded_tokens": status.num_decoded_tokens,
            "kv_use": self._kv_use,
            "syncs": [
                {name: getattr(sync, name) for name in sync.__struct_fields__}
                for sync in status.syncs
            ],
        }

    def picture(self) -> Group:
        """The same for people."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        status = self._status
        decoded, prompts = self._rates["num_decoded_tokens"], self._rates["num_prompt_tokens"]
        counts = Table.grid(padding=(0, 2))
        for name, value in (
            ("engine", Text(f"process {status.pid} at {self._address}", no_wrap=True)),
            ("model", Text(str(status.resolved.get("model_path") or ""), no_wrap=True)),
            ("state", Text(self._state, style="green" if self._state == "serving" else "bold red")),
            ("version", f"{status.weight_version!r} (number {status.version})"),
            ("requests", f"{status.num_running:,} running, {status.num_waiting:,} waiting"),
            ("tokens", f"{_rate(decoded)} decoded, {_rate(prompts)} of prompts"),
            ("KV cache", f"{_bar(self._kv_use)} {self._kv_use:4.0%} of {status.num_blocks:,} blocks"),
        ):  # fmt: skip
            counts.add_row(Text(name, style="dim"), value)
        syncs = Table(title="last weight updates", title_justify="left", box=None, padding=(0, 1))
        for name in (
            "version",
            "label",
            "ago",
            "tensors",
            "stage",
            "copy",
            "verify",
            "pause",
            "total",
        ):
            is_label = name == "label"
            syncs.add_column(
                name,
                justify="left" if is_label else "right",
                max_width=16 if is_label else None,
                no_wrap=True,
            )
        for sync in status.syncs:
            seconds = (sync.stage_s, sync.copy_s, sync.verify_s, sync.pause_s, sync.total_s)
            syncs.add_row(
                str(sync.version),
                Text(sync.label or ""),
                _ago(sync.ago_s),
                f"{sync.num_updated:,}",
                *map(_seconds, seconds),
            )
        none = Text("no weight updates yet", style="dim")
        return Group(counts, syncs if status.syncs else none)

    @property
    def _kv_use(self) -> float:
        status = self._status
        return 1.0 - status.num_free_blocks / status.num_blocks if status.num_blocks else 0.0

    @property
    def _state(self) -> str:
        status = self._status
        if status.torn is not None:
            return f"torn: {status.torn}"
        if status.paused is not None:
            return f"paused ({status.paused}), {status.pause_left_s or 0.0:.0f} s left"
        if status.released:
            return f"memory released: {', '.join(status.released)}"
        return "serving"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}/s"


def _bar(share: float) -> str:
    full = round(share * _BAR)
    return "█" * full + "░" * (_BAR - full)


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
