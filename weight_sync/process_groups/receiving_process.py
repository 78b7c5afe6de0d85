"""A gloo member in a process of its own, for groups of trainers whose messages may have any length.

gloo ends the process of a member that gets a longer message than it has posted: it throws on the thread of its event
loop, where nobody can catch it. An engine must survive that, so another process is the member, and receives into
memory that both see. When that process ends, the engine has an error, and its peers see a closed connection. So it
leaves a group at once, too, whatever gloo waits for.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

import msgspec
import torch
from torch.distributed import TCPStore

from ..errors import DeadlineExceeded, TransportError
from ..layout.memory import Range, storage_key
from ..time_left import left_s
from .calls import GRACE_S
from .children import start_command
from .expected import BEHIND_BYTES
from .joining import Joiner, RendezvousPlace
from .meeting import Meeting
from .receiving_child import ERRORS, Connect, Done, Incoming, Take

_NAME = "update-group"
_MOST_WORDS = 4000
_LENGTHS = re.compile(r"preamble\.length\s*<=\s*op\.nbytes\D*\s(\d+) vs (\d+)")
"""What gloo says of a message that is longer than the memory that was posted for it: both numbers of bytes."""


class ReceivingProcesses:
    """What receiving processes are forked from: a process that has loaded what they need, made for the first of them.

    Started once, it makes the next member in milliseconds, also after one has been lost. From any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None

    def start(self, name: str, *, rank: int, size: int) -> ReceivingProcess:
        """A process that will be a member of a group of that name; its `connect` comes next."""
        me = f"group {name!r}, rank {rank} of {size}"
        try:
            with self._lock:
                if self._process is None or self._process.poll() is not None:
                    self._end()
                    self._begin()
                assert self._orders is not None
                return ReceivingProcess(me, self._orders)
        except OSError as error:
            raise TransportError(
                f"{me}: cannot start a process to receive in: got {error}, expected {sys.executable!r} to run; look at "
                "the limits on processes and descriptors"
            ) from error

    def close(self) -> None:
        """End it; members that have been started live on. Safe to repeat."""
        with self._lock:
            self._end()

    def _begin(self) -> None:
        self._orders, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                start_command("weight_sync.process_groups.receiving_child", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )

    def _end(self) -> None:
        if self._orders is not None:
            self._orders.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._orders = self._process = None


class ReceivingProcess:
    """A process that is a member of a gloo group, and the memory that it shares with this one.

    Commands run one at a time, from one thread; `abort` and `landing` from any.
    """

    def __init__(self, me: str, orders: socket.socket) -> None:
        """`me`: what errors call it. `orders`: where its parent takes descriptors, and forks."""
        self._me = me
        self._lock = threading.Lock()
        self._landing = torch.empty(0, dtype=torch.uint8)
        self._read = b""
        with contextlib.ExitStack() as undo:
            self._commands, theirs = socket.socketpair()
            undo.callback(self._commands.close)
            with theirs:
                self._memory = os.memfd_create(_NAME, os.MFD_CLOEXEC)
                undo.callback(os.close, self._memory)
                self._words = os.memfd_create(f"{_NAME}-words", os.MFD_CLOEXEC)
                undo.callback(os.close, self._words)
                socket.send_fds(orders, [b"."], [theirs.fileno(), self._memory, self._words])
            undo.pop_all()

    def connect(self, command: Connect) -> None:
        """Join the group; returns when all members are connected."""
        self._carry_out(command, "joining", command.end)

    def landing(self, num_bytes: int) -> torch.Tensor:
        """Memory to receive into, uint8, the same at every call as long as it is large enough.

        `torch.OutOfMemoryError` when there is none; `TransportError` when the group was left.
        """
        room = num_bytes + BEHIND_BYTES
        with self._lock:
            if self._memory < 0:
                raise TransportError(f"{self._me}: got a call after it was left; make a new group")
            if self._landing.numel() < room:
                try:
                    os.posix_fallocate(
                        self._memory, 0, room
                    )  # or a write faults when there is none
                    mapped = mmap.mmap(self._memory, room)
                except (OSError, ValueError) as error:
                    raise torch.OutOfMemoryError(str(error)) from error
                self._landing = torch.frombuffer(mapped, dtype=torch.uint8)
            return self._landing[:num_bytes]

    def receive(
        self, buffer: torch.Tensor, ranges: Sequence[Range], *, telling: Sequence[int], end: float
    ) -> None:
        """Fill the `ranges` of `buffer`, which is of `landing`, with a broadcast of rank 0 each.

        `telling`: see `telling_bytes`. `TransportError` when another number of bytes came.
        """
        assert storage_key(buffer) == storage_key(self._landing), "of `landing`"
        first = int(buffer.storage_offset())
        parts = [
            Incoming(first + start, first + stop, tells)
            for (start, stop), tells in zip(ranges, telling, strict=True)
        ]
        self._carry_out(Take(parts=parts, end=end), f"a receive of {len(parts)} messages", end)

    def abort(self) -> None:
        """End the process, and with it whatever it does. From any thread; safe to repeat."""
        with self._lock, contextlib.suppress(OSError):
            self._commands.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """`abort`, and give back what is here; on the thread of commands. Safe to repeat."""
        self.abort()
        with self._lock:
            if self._memory >= 0:
                os.close(self._memory)
                os.close(self._words)
            self._commands.close()
            self._memory = self._words = -1
            self._landing = torch.empty(0, dtype=torch.uint8)

    def _carry_out(self, command: Connect | Take, what: str, end: float) -> None:
        try:
            self._commands.settimeout(left_s(end) + GRACE_S)
            self._commands.sendall(msgspec.json.encode(command) + b"\n")
            done = self._answer(end)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._me}: got no end of {what} by its deadline, expected every member to take part; look for one "
                "that is late or stopped, and make a new group"
            ) from error
        except (EOFError, OSError) as error:
            raise TransportError(self._obituary(what)) from error
        if done.kind:
            raise ERRORS[done.kind](done.message)

    def _answer(self, end: float) -> Done:
        while b"\n" not in self._read:
            self._commands.settimeout(left_s(end) + GRACE_S)
            more = self._commands.recv(1 << 16)
            if not more:
                raise EOFError
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return msgspec.json.decode(line, type=Done)

    def _obituary(self, what: str) -> str:
        """Why it ended, from what it said last."""
        size = os.fstat(self._words).st_size
        last = os.pread(self._words, _MOST_WORDS, max(0, size - _MOST_WORDS))
        words = last.decode(errors="replace")
        lengths = _LENGTHS.search(words)
        if lengths is not None:
            sent, posted = map(int, lengths.groups())
            return (
                f"{self._me}: got more bytes than announced in {what}: a message of {sent}, expected "
                f"{posted - BEHIND_BYTES}; send each tensor in the dtype and shape that were announced for it"
            )
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        return (
            f"{self._me}: {what} failed, got the end of the process that receives (it said last: "
            f"{' '.join(lines[-3:])[-500:]!r}), expected it to live; make a new group"
        )


def connect_command(
    member: Joiner, place: RendezvousPlace, meeting: Meeting, *, end: float
) -> Connect:
    """What makes a `ReceivingProcess` a member in place of this one."""
    assert isinstance(place.store, TCPStore)
    return Connect(
        host=place.store.host,
        port=place.store.port,
        prefix=meeting.prefix,
        rank=member.rank,
        size=member.world_size,
        name=member.name,
        address=place.address,
        end=end,
    )
