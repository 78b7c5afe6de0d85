"""Weights over a process group: the trainer is rank 0, and engine ranks receive what it broadcasts.

An `UpdateGroup` is one member; here is what both kinds have in common. All that can block runs on a thread of its own,
off the caller's: joining, sending and receiving return futures, which fail with `DeadlineExceeded` or `TransportError`
by their deadlines, whatever another member does. After such an error the group is of no more use, and says so to its
peers by closing its connections; `destroy` it and make a new one, under the same name if you like.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, Protocol, Self, TypeVar

import torch

from ..errors import TransportError
from ..process_groups.calls import CallThread
from ..process_groups.communicator import Communicator, keep_until_aborted
from ..process_groups.joining import Joiner, RendezvousPlace, check_member, gpu_name
from ..process_groups.meeting import GroupTerms


class Connection(Protocol):
    """What makes this process a member."""

    def abort(self) -> None:
        """From any thread: what is under way fails, as far as the backend can."""

    def close(self) -> None:
        """On the group's thread: leave."""


T = TypeVar("T")
ConnectionT = TypeVar("ConnectionT", bound=Connection)

_NCCL_DEPTH = 16
_BRIEF_S = 0.1


class UpdateGroup(Generic[ConnectionT]):
    """One member of an update group: a trainer's `TrainerGroup` or an engine rank's `JoinedGroup`.

    Calls of a member run in the order in which they are made; all members make them in the same order. A future's
    result is to be awaited before its buffers are used again.
    """

    joined: Future[None]
    """Done when the members are connected (NCCL with a plain trainer: when its rendezvous was found)."""
    master_port: int
    """Where the rendezvous is; the trainer tells it to the engines."""

    def __init__(self, member: Joiner, device: torch.device) -> None:
        check_member(member, device)
        self.name = member.name
        """What members and errors call the group."""
        self.rank = member.rank
        """0 for the trainer, from 1 for engine ranks."""
        self.world_size = member.world_size
        """Number of members."""
        self.backend = member.backend
        """"gloo" or "nccl"."""
        self.device = device
        """Where buffers are."""
        self._member = dataclasses.replace(member, gpu=gpu_name(device))
        self._place: RendezvousPlace | None = None
        self._offer: GroupTerms | None = None
        self._connection: ConnectionT | None = None
        self._stream: torch.cuda.Stream | None = None
        self._broken: str | None = None
        self._thread = CallThread(
            f"update-group-{self.name}",
            watch=self._lost,
            on_overrun=self._abort,
            on_end=self._release,
        )

    @property
    def broken(self) -> str | None:
        """Why the group is of no more use, or None."""
        return self._broken

    def destroy(self, *, wait_s: float = 1.0) -> None:
        """Leave the group: what is under way fails at once, and peers that wait for this member fail too.

        Blocks at most `wait_s`. Connections that an operation still uses are closed when it ends, by its deadline at
        the latest. Safe to repeat, from any thread.
        """
        self._broken = self._broken or "it was destroyed"
        self._abort()
        self._thread.close(wait_s=wait_s)

    def keep_until_left(self, memory: object) -> None:
        """After `destroy`: keep what its operations may still read or write, until they certainly do not."""
        # Most calls end with their connections, and then whoever waits for the memory has it at once.
        left = self._thread.join(_BRIEF_S)
        keep_until_aborted(memory, None if left else self._thread.join)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.destroy()

    @property
    def _depth(self) -> int:
        """Parts that are under way at once. NCCL has them one after another, and must not wait for the next one."""
        if self.backend == "nccl":
            return _NCCL_DEPTH
        return 2 * (self._offer.connections if self._offer is not None else 1)

    def _submit(self, what: str, timeout_s: float, call: Callable[[float], T]) -> Future[T]:
        end = time.monotonic() + timeout_s
        cuda = self.device.type == "cuda"
        # What the caller has put on its stream so far comes first.
        before = torch.cuda.current_stream(self.device).record_event() if cuda else None

        def guarded() -> T:
            if self._broken is not None:
                raise TransportError(
                    f"{self._member}: got a call after it broke ({self._broken}), expected none; destroy it and make a "
                    "new one"
                )
            try:
                with self._on_device(before):
                    return call(end)
            except BaseException as error:
                self._break(error)
                raise

        return self._thread.submit(guarded, timeout_s=timeout_s, what=f"{self._member}: {what}")

    def _connect_nccl(self, communicator: Communicator, end: float) -> None:
        """NCCL connects in its first operation; here a member that cannot still fails the joining."""
        if self.backend == "nccl" and self._offer is not None:
            first = torch.zeros(1, dtype=torch.uint8, device=self.device)
            communicator.post_broadcast(first, root=0, timeout_s=end - time.monotonic()).wait()

    def _is_abandoned(self) -> bool:
        return self._thread.over

    @contextmanager
    def _on_device(self, before: torch.cuda.Event | None) -> Iterator[None]:
        """On CUDA, operations run on a stream of the group's own, beside the engine's."""
        if before is None:
            yield
            return
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_event(before)
            with torch.cuda.stream(self._stream):
                yield

    def _break(self, error: BaseException) -> None:
        """On the group's thread: peers learn of the failure from their closed connections."""
        self._broken = self._broken or f"{type(error).__name__}: {error}"
        self._release()

    def _lost(self) -> str | None:
        """Why the trainer is known to be gone. gloo does not always tell members that wait for a message from it."""
        place = self._place
        return place.lifeline.lost() if place is not None and place.lifeline is not None else None

    def _abort(self) -> None:
        """From any thread: free the group's thread where the backend can."""
        connection = self._connection
        if connection is not None:
            connection.abort()

    def _release(self) -> None:
        """On the group's thread: close the connections."""
        if self._connection is not None:
            self._connection.close()
        if self._place is not None and self._place.lifeline is not None:
            self._place.lifeline.close()
        self._connection = self._place = None
