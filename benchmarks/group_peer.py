"""The receiving end of `rollout bench group` that is no engine: `python -m rollout_benchmarks.group_peer PORT`.

Connects to the benchmark at PORT of the loopback, learns the tensors, and then receives their bytes as it is told, into
one buffer that stands for the parameters. Messages are lines of JSON; ends when the benchmark hangs up.
"""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import weight_sync
from weight_sync.staging.joined_group import JoinedGroup

from .shapes import DTYPES

HOST = "127.0.0.1"
DEADLINE_S = 120.0
"""Of each message, and of each operation over a group."""


class Line:
    """Messages over one socket: a JSON object per line, each within `DEADLINE_S`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(DEADLINE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._file = connection.makefile("r", encoding="utf-8")

    def say(self, **message: Any) -> None:
        """Send one message."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """The next message; None when the other side has hung up."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._connection.close()


def plain_gloo(store: dist.Store, rank: int) -> Any:
    """One of two members of a gloo group as `torch.distributed` makes it, on the loopback, with no global state.

    A `ProcessGroupGloo`, whose stubs do not know its operations.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
    options._timeout = timedelta(seconds=DEADLINE_S)
    return dist.ProcessGroupGloo(store, rank, 2, options)


def cut_evenly(memory: torch.Tensor, num: int) -> list[memoryview]:
    """`num` contiguous parts of uint8 `memory`, for as many sockets."""
    step = math.ceil(memory.numel() / num)
    data: Any = memory.numpy()
    return [memoryview(data[i * step : (i + 1) * step]) for i in range(num)]


def side_by_side(calls: list[Callable[[], None]]) -> None:
    """Run all at once, each on a thread; raises what the first one raised."""
    failures: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Receiver:
    """Parameters, and the ways in which their bytes arrive."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._dtype = DTYPES[setup["dtype"]]
        self._shapes = {name: tuple(shape) for name, shape in setup["shapes"]}
        numel = sum(math.prod(shape) for shape in self._shapes.values())
        self._memory = torch.zeros(numel * self._dtype.itemsize, dtype=torch.uint8)
        self._parameters = self._split(self._memory.view(self._dtype))
        address = (HOST, setup["data_port"])
        self._sockets = [
            socket.create_connection(address, DEADLINE_S) for _ in range(setup["num_streams"])
        ]
        store = dist.TCPStore(HOST, setup["store_port"], is_master=False)
        self._plain = plain_gloo(dist.PrefixStore("plain", store), rank=1)
        self._group = JoinedGroup.join(
            master_address=HOST,
            master_port=setup["group_port"],
            rank=1,
            world_size=2,
            group_name=setup["group_name"],
            timeout_s=DEADLINE_S,
        )
        self._group.joined.result(DEADLINE_S)
        self.ways: dict[str, Callable[[dict[str, Any]], None]] = {
            "sockets": self._from_sockets,
            "group": self._from_group,
            "each": self._tensor_by_tensor,
            "flat": self._flat,
        }

    def _split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views into `flat`, in order."""
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = flat.split(sizes)
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _from_sockets(self, message: dict[str, Any]) -> None:
        parts = cut_evenly(self._memory, message["num"])

        def fill(connection: socket.socket, part: memoryview) -> None:
            while part:
                got = connection.recv_into(part)
                if not got:
                    raise ConnectionError("the benchmark closed a data socket too early")
                part = part[got:]

        pairs = zip(self._sockets, parts, strict=False)
        side_by_side([partial(fill, *pair) for pair in pairs])

    def _from_group(self, message: dict[str, Any]) -> None:
        self._group.receive_into(self._memory, timeout_s=DEADLINE_S).result(DEADLINE_S)

    def _tensor_by_tensor(self, message: dict[str, Any]) -> None:
        """As engines do that load each tensor when it has come: new memory, a broadcast, a copy."""
        for parameter in self._parameters.values():
            new = torch.empty_like(parameter)
            self._plain.broadcast(new, 0).wait()
            parameter.copy_(new)

    def _flat(self, message: dict[str, Any]) -> None:
        """As engines do that are sent a flattened bucket."""
        flat = torch.empty(self._memory.numel() // self._dtype.itemsize, dtype=self._dtype)
        self._plain.broadcast(flat, 0).wait()
        for name, new in self._split(flat).items():
            self._parameters[name].copy_(new)

    def fingerprint(self) -> int:
        """Of what has arrived; then it is forgotten."""
        value = weight_sync.fingerprint(self._parameters)
        self._memory.zero_()
        return value

    def close(self) -> None:
        """Leave the group, close the sockets."""
        self._group.destroy()
        for connection in self._sockets:
            connection.close()


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Serve until the benchmark hangs up."""
    line = Line(socket.create_connection((HOST, int(arguments[0])), DEADLINE_S))
    setup = line.hear()
    if setup is None:
        return 1
    receiver = Receiver(setup)
    line.say(ready=True)
    while (message := line.hear()) is not None:
        if message["way"] == "fingerprint":
            line.say(fingerprint=receiver.fingerprint())
            continue
        line.say(ready=True)
        receiver.ways[message["way"]](message)
        line.say(done=True)
    receiver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
