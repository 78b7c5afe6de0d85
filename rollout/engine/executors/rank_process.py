"""One child process that runs one rank: started with JSON, watched, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
from collections.abc import Sequence

import msgspec

from weight_sync.errors import EngineDiedError
from weight_sync.process_groups.children import exit_words, start_command
from weight_sync.time_left import left_s

from ...config import EngineConfig
from ..loop.ranks import RankSpec
from .child_output import ChildOutput
from .rank_server import reported_address


class RankProcess:
    """A rank in a child process of this one."""

    def __init__(self, config: EngineConfig, spec: RankSpec) -> None:
        self._rank = spec.rank
        read_end, write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                start_command("rollout.engine.executors.child", str(write_end)),
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(write_end,),
                env=_environment(config),
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._ready_pipe = os.fdopen(read_end, "rb", buffering=0)
        self._report = b""
        assert self._process.stderr is not None
        self._output = ChildOutput(self._process.stderr, f"rollout-rank-{spec.rank}")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has died already; `await_ready` says so.
            self._process.stdin.write(
                msgspec.json.encode(spec) + b"\n" + msgspec.json.encode(config) + b"\n"
            )
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def fileno(self) -> int:
        """The pipe on which it reports, for a selector."""
        return self._ready_pipe.fileno()

    def read_report(self) -> str | None:
        """The address that it reports once it serves, or None while the report is not whole; call when readable.

        Raises its error, should it fail to start, and `EngineDiedError` when it ends without a report.
        """
        chunk = self._ready_pipe.read(1 << 16)
        if not chunk:
            raise EngineDiedError(
                f"rank {self._rank} ended while starting ({self._end_words()}){self._output.last_words()}"
            )
        self._report += chunk
        return reported_address(json.loads(self._report)) if self._report.endswith(b"\n") else None

    def _end_words(self) -> str:
        try:
            return exit_words(self._process.wait(timeout=10.0))
        except subprocess.TimeoutExpired:
            return "it reports nothing any more, and still runs"

    def close_report(self) -> None:
        """It has said all that it says there. Safe to repeat."""
        self._ready_pipe.close()

    @property
    def exit_code(self) -> int | None:
        """How the child ended, as `subprocess` says it; None while it lives."""
        return self._process.poll()

    def why_dead(self) -> str | None:
        """Why the child is gone, or None while it lives."""
        code = self.exit_code
        if code is None:
            return None
        words = exit_words(code)
        return (
            f"rank {self._rank} of the engine (process {self._process.pid}) is gone: {words}; "
            f"start a new Engine{self._output.last_words()}"
        )

    def kill(self) -> None:
        """End it now; fine when it is gone."""
        self._process.kill()

    def let_go(self) -> None:
        """Close its lifeline: it ends by itself unless it hangs."""
        self.close_report()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                # A word, because a child that this process has forked may hold the pipe open.
                self._process.stdin.write(b"end\n")
                self._process.stdin.flush()
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for its end; whether it came."""
        try:
            self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, grace_s: float) -> None:
        """Wait up to `grace_s` seconds for its end, then kill it."""
        if not self.wait(grace_s):
            self._process.kill()
            self._process.wait()
        self._output.close()


def await_ready(ranks: Sequence[RankProcess], deadline: float, start_timeout_s: float) -> list[str]:
    """The addresses that all ranks report, in their order; the first error of any ends the wait.

    Ranks wait for each other, so one that fails leaves the others waiting. `EngineDiedError` by `deadline` (monotonic),
    which is the end of `start_timeout_s`.
    """
    addresses: dict[RankProcess, str] = {}
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank, selectors.EVENT_READ, rank)
        while len(addresses) < len(ranks):
            ready = selector.select(left_s(deadline))
            if not ready:
                late = [i for i, rank in enumerate(ranks) if rank not in addresses]
                raise EngineDiedError(
                    f"ranks {late} were not ready within {start_timeout_s:.3g} s; raise start_timeout_s, or look at "
                    "their messages above"
                )
            for key, _ in ready:
                address = key.data.read_report()
                if address is not None:
                    addresses[key.data] = address
                    selector.unregister(key.data)
                    key.data.close_report()
    return [addresses[rank] for rank in ranks]


def _environment(config: EngineConfig) -> dict[str, str]:
    environment = dict(os.environ)
    if config.num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(config.num_threads)
    return environment
