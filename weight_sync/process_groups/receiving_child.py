"""Main of the process that receiving processes are forked from, and what they do (see `receiving_process`).

The first one has loaded what they need and has no threads. It gets descriptors through a socket, and forks: the child
is a member of one group. That one carries out commands that come through a socket of its own, a line of JSON each, and
answers each with one. It ends when its socket or its owner does, or when gloo ends it: that is what it is for.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

import msgspec
import torch
from torch.distributed import TCPStore

from ..errors import DeadlineExceeded, SyncError, TransportError
from ..time_left import left, left_s
from .backends import open_gloo
from .children import life_of, readable
from .communicator import Communicator
from .expected import receive_expected
from .last_reads import read_away_at_the_end
from .parts import MADV_POPULATE_WRITE
from .rendezvous import store_error, under

NUM_DESCRIPTORS = 3
"""What a member gets: its end of a socket, memory to receive into, and a file for its last words."""


class Connect(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Be a member of a gloo group."""

    host: str
    """Where its store is served."""
    port: int
    """The store's port."""
    prefix: str
    """What precedes the group's keys in the store."""
    rank: int
    """This member."""
    size: int
    """Number of members."""
    name: str
    """What errors call the group."""
    address: str
    """Where the others reach this machine."""
    end: float
    """Deadline, on the clock that all processes of a machine share (`time.monotonic`)."""


class Incoming(msgspec.Struct, frozen=True, array_like=True):
    """One message to receive."""

    start: int
    """Its first byte in the memory."""
    stop: int
    """Where it ends."""
    telling: int
    """See `telling_bytes`."""


class Take(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Receive messages into the memory, in order."""

    parts: Sequence[Incoming]
    """Where each of them belongs."""
    end: float
    """Deadline, as in `Connect`."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a command."""

    kind: str = ""
    """Class of its error; empty when there was none."""
    message: str = ""
    """What the error says."""


ERRORS: dict[str, type[SyncError]] = {
    error.__name__: error for error in (DeadlineExceeded, TransportError)
}
"""What a command may fail with."""


class Membership:
    """The group that this process is in."""

    def __init__(self, memory: int) -> None:
        self._memory_fd = memory
        self._at_the_end = read_away_at_the_end()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._communicator: Communicator | None = None

    def carry_out(self, command: Connect | Take) -> None:
        """Raises one of `ERRORS`."""
        if isinstance(command, Connect):
            self._connect(command)
        else:
            self._take(command)

    def _connect(self, command: Connect) -> None:
        try:
            # Uncounted: the owner has been here, and a plain trainer counts who comes.
            store = TCPStore(
                command.host,
                command.port,
                is_master=False,
                timeout=left(command.end),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise store_error(
                f"cannot join the rendezvous at {command.host}:{command.port}", error
            ) from error
        timeout_s = left_s(command.end)
        self._communicator = open_gloo(
            under(store, command.prefix),
            rank=command.rank,
            size=command.size,
            name=command.name,
            address=command.address,
            join_timeout_s=timeout_s,
            timeout_s=timeout_s,
        )

    def _take(self, command: Take) -> None:
        assert self._communicator is not None, "Connect comes first"
        num_bytes = os.fstat(self._memory_fd).st_size
        if num_bytes > self._memory.numel():
            memory = mmap.mmap(self._memory_fd, num_bytes)
            with contextlib.suppress(OSError, ValueError):  # a hint: all pages at once
                memory.madvise(MADV_POPULATE_WRITE)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        receive_expected(
            self._communicator,
            [self._memory[part.start : part.stop] for part in command.parts],
            end=command.end,
            telling=[part.telling for part in command.parts],
        )


def main() -> int:
    """Serve the process that started this one; returns the exit code."""
    owner = life_of(os.getppid())
    # Ctrl-C in a terminal reaches the whole process group; the owner decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # nobody waits for them: they are reaped as they end
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # their abort is an answer
    orders = socket.socket(fileno=int(sys.argv[1]))
    while orders.fileno() in readable([orders.fileno(), *owner]):
        _, descriptors, _, _ = socket.recv_fds(orders, 1, NUM_DESCRIPTORS)
        if len(descriptors) < NUM_DESCRIPTORS:
            break
        if os.fork() == 0:
            orders.close()
            _be_member(owner, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
    return 0


def _be_member(owner: list[int], commands: int, memory: int, words: int) -> NoReturn:
    """In a forked process: one member, until its commands end."""
    os.dup2(words, 1)
    os.dup2(words, 2)
    member, line = Membership(memory), socket.socket(fileno=commands)
    threading.Thread(target=_end_with, args=(line, owner), name="lifeline", daemon=True).start()
    for command in line.makefile("rb"):
        done = Done()
        try:
            member.carry_out(msgspec.json.decode(command, type=Connect | Take))
        except SyncError as error:
            done = Done(kind=type(error).__name__, message=str(error))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        line.sendall(msgspec.json.encode(done) + b"\n")
    os._exit(0)  # whatever gloo still does, nobody waits for it


def _end_with(line: socket.socket, owner: list[int]) -> None:
    """End at once when the other end of `line` or the owner has: the process may be anywhere in gloo."""
    ends = select.poll()
    ends.register(line, select.POLLRDHUP)
    for life in owner:
        ends.register(life, select.POLLIN)
    ends.poll()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
