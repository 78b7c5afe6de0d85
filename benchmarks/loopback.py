"""Other ways for the bytes of a model to reach another process of this machine: sockets, and gloo as it is usual."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist

import weight_sync
from weight_sync.transports.trainer_group import TrainerGroup

from .group_peer import DEADLINE_S, HOST, Line, cut_evenly, plain_gloo, side_by_side


class LoopbackPeer:
    """A receiving process, and the sender's end of every way. Each way returns seconds until all has arrived.

    `source` (uint8) is what sockets and the update group send: the tensors one after another, without padding. The
    usual ways send the tensors themselves.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], source: torch.Tensor, *, num_streams: int
    ) -> None:
        self._tensors = list(tensors.values())
        self._named = tensors
        self._source = source
        self._group = TrainerGroup.serve(
            world_size=2,
            group_name=f"bench-{secrets.token_hex(4)}",
            host=HOST,
            timeout_s=DEADLINE_S,
        )
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        with socket.create_server((HOST, 0)) as control, socket.create_server((HOST, 0)) as data:
            control.settimeout(DEADLINE_S)
            data.settimeout(DEADLINE_S)
            module = "rollout_benchmarks.group_peer"
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(control.getsockname()[1])],
                stdin=subprocess.DEVNULL,
            )
            try:
                self._connect(control, data, num_streams)
            except BaseException:
                self._process.kill()
                self._process.wait(timeout=30)
                self._group.destroy()
                raise

    def _connect(self, control: socket.socket, data: socket.socket, num_streams: int) -> None:
        self._line = Line(control.accept()[0])
        self._line.say(
            dtype=str(self._tensors[0].dtype).removeprefix("torch."),
            shapes=[(name, list(tensor.shape)) for name, tensor in self._named.items()],
            data_port=data.getsockname()[1],
            num_streams=num_streams,
            store_port=self._store.port,
            group_port=self._group.master_port,
            group_name=self._group.name,
        )
        self._sockets = [data.accept()[0] for _ in range(num_streams)]
        self._plain = plain_gloo(dist.PrefixStore("plain", self._store), rank=0)
        self._group.joined.result(DEADLINE_S)
        self._hear()

    def sockets(self, num: int) -> float:
        """`num` plain TCP sockets, each with a thread at both ends and its share of the bytes."""
        pairs = list(zip(self._sockets, cut_evenly(self._source, num), strict=False))

        def send() -> None:
            side_by_side([partial(line.sendall, part) for line, part in pairs])

        return self._timed(send, way="sockets", num=num)

    def group(self) -> float:
        """`TrainerGroup.broadcast` alone: no session, no check, no copy."""

        def send() -> None:
            self._group.broadcast(self._source, timeout_s=DEADLINE_S).result(DEADLINE_S)

        return self._timed(send, way="group")

    def tensor_by_tensor(self) -> float:
        """A gloo broadcast for each tensor into new memory, copied into the parameter when it is there."""

        def send() -> None:
            for tensor in self._tensors:
                self._plain.broadcast(tensor, 0).wait()

        return self._timed(send, way="each")

    def flat(self) -> float:
        """All tensors concatenated, one gloo broadcast into new memory, and a copy per tensor out of it."""

        def send() -> None:
            flat = torch.cat([tensor.flatten() for tensor in self._tensors])
            self._plain.broadcast(flat, 0).wait()

        return self._timed(send, way="flat")

    def prove(self, num_streams: tuple[int, ...]) -> None:
        """Take every way once and compare what has arrived."""
        expected = weight_sync.fingerprint(self._named)
        ways: list[Callable[[], float]] = [self.group, self.tensor_by_tensor, self.flat]
        ways += [partial(self.sockets, num) for num in num_streams]
        for way in ways:
            way()
            self._line.say(way="fingerprint")
            found = self._hear()["fingerprint"]
            if found != expected:
                raise AssertionError(f"{way}: got fingerprint {found:#x}, expected {expected:#x}")

    def close(self) -> None:
        """End the other process."""
        self._line.close()
        self._group.destroy()
        for connection in self._sockets:
            connection.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _timed(self, send: Callable[[], None], **message: Any) -> float:
        """Both ends are ready before the clock starts."""
        self._line.say(**message)
        self._hear()
        start = time.perf_counter()
        send()
        self._hear()
        return time.perf_counter() - start

    def _hear(self) -> dict[str, Any]:
        message = self._line.hear()
        if message is None:
            raise RuntimeError("the receiving process has ended; its messages are above")
        return message
