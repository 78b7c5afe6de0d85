"""Members of update groups in other processes, as tests see them."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from weight_sync.staging.joined_group import JoinedGroup

NAME = "update"
REPLY_S = 180.0


class PeerError(Exception):
    """What a command raised there: `kind` is the name of its class."""

    def __init__(self, kind: str, message: str, seconds: float) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.seconds = seconds


class Peer:
    """One process that runs `process_group_peer.py`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("process_group_peer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._read = b""
        self.pending = 1  # it says that it is ready

    def start(self, do: str, **arguments: Any) -> None:
        """Send a command, and do not wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        self.pending += 1

    def finish(self, timeout_s: float = REPLY_S) -> Any:
        """The result of the oldest command that was started; `PeerError` with what it raised."""
        answer: dict[str, Any] = {}
        while self.pending and "result" not in answer and "error" not in answer:
            answer = json.loads(self._line(timeout_s))
            self.pending -= 1
            if answer.get("result") == "ready":
                answer = {}
        if "error" in answer:
            raise PeerError(answer["error"], answer["message"], answer["seconds"])
        return answer["result"]

    def do(self, do: str, **arguments: Any) -> Any:
        """Send a command and wait for its result."""
        self.start(do, **arguments)
        return self.finish()

    def signal(self, number: signal.Signals) -> None:
        """To this process, by its id."""
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(10)

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _line(self, timeout_s: float) -> bytes:
        assert self.process.stdout is not None
        end = time.monotonic() + timeout_s
        while b"\n" not in self._read:
            left_s = max(0.0, end - time.monotonic())
            ready, _, _ = select.select([self.process.stdout], [], [], left_s)
            assert ready, f"no answer within {timeout_s} s"
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, f"the peer ended with code {self.process.wait(10)}"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line


class PeerPool:
    """Peers that tests share, because starting one costs more than most tests."""

    def __init__(self) -> None:
        self._peers: list[Peer] = []

    def take(self, number: int) -> list[Peer]:
        """That many idle peers, which have started: deadlines of a test begin with the test."""
        self._drop([peer for peer in self._peers if peer.process.poll() is not None])
        while len(self._peers) < number:
            self._peers.append(Peer())
        for peer in self._peers[:number]:
            peer.do("is_idle")
        return self._peers[:number]

    def tidy(self) -> None:
        """After a test: keep only peers that are idle and hold no group."""
        self._drop(
            [
                peer
                for peer in self._peers
                if peer.process.poll() is not None or peer.pending or not peer.do("is_idle")
            ]
        )

    def close(self) -> None:
        self._drop(self._peers)

    def _drop(self, peers: list[Peer]) -> None:
        for peer in peers:
            peer.close()
        self._peers = [peer for peer in self._peers if peer not in peers]


def join(port: int | str, **options: Any) -> JoinedGroup:
    """This process as engine rank 1 of the group at `port`."""
    defaults = {"rank": 1, "world_size": 2, "group_name": NAME, "timeout_s": 120.0}
    return JoinedGroup.join(master_address="127.0.0.1", master_port=port, **{**defaults, **options})


def free_port() -> int:
    """A port that the system has just given out, for a trainer that must name one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def num_descriptors() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def num_threads() -> int:
    """Threads of this process, Python's and others'."""
    return len(os.listdir("/proc/self/task"))


def group_threads() -> set[threading.Thread]:
    """Threads of this process that belong to update groups, also to those that an earlier test has left behind."""
    return {t for t in threading.enumerate() if t.name.startswith("update-group-")}
