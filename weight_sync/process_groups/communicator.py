"""gloo and NCCL communicators made by the backend's own constructor, with a deadline on every operation.

Bytes are what travels: except in `all_reduce`, tensors are handed over as uint8, so every dtype works on every backend.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
)

from ..errors import DeadlineExceeded, TransportError
from .rendezvous import first_line, left

_NCCL_POLL_S = 0.0002


class Posted:
    """An operation that was started and not yet waited for."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Until the buffer is whole (receiver) or free again (sender), seen from the host."""
        self._finish()


class _Held:
    """A backend that is let go of before the interpreter ends.

    gloo's threads touch tensors; one that does so while Python is being torn down ends the process with an abort.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.num_under_way = 0

    def drop_if_idle(self) -> None:
        """The backend's destructor waits for what is under way, so a busy one is left to the end of the process."""
        if self.num_under_way == 0:
            self.backend = None


class Communicator:
    """One member's end of a gloo or NCCL group. One thread at a time; `abort` from any.

    Over gloo every operation returns when it is done. Over NCCL they are ordered on the current CUDA stream, as
    torch's are, except `Posted.wait`, which waits on the host with a deadline and aborts the communicator behind it.
    Errors are `DeadlineExceeded` or `TransportError`; after one the communicator is of no more use.
    """

    def __init__(
        self, backend: Any, *, kind: str, rank: int, size: int, name: str, timeout_s: float
    ) -> None:
        self.kind = kind
        """"gloo" or "nccl"."""
        self.rank = rank
        """This member's position, from 0."""
        self.size = size
        """Number of members."""
        self.name = name
        """What errors call the group."""
        self.timeout_s = timeout_s
        """Deadline of an operation that is given none."""
        self._held = _Held(backend)
        weakref.finalize(self, self._held.drop_if_idle)

    def post_broadcast(self, tensor: torch.Tensor, *, root: int, timeout_s: float) -> Posted:
        """Start to send `tensor`, if this is `root`, or to fill it; contiguous, as many bytes on every member.

        Members must post in the same order; several may be under way.
        """
        end = time.monotonic() + timeout_s
        options = BroadcastOptions()
        options.rootRank = root
        options.timeout = left(end)
        what = f"a broadcast of {tensor.nbytes} bytes"
        work = self._started(what, lambda backend: backend.broadcast([as_bytes(tensor)], options))
        return Posted(lambda: self._finished(what, work, end))

    def broadcast(
        self, tensor: torch.Tensor, *, root: int = 0, timeout_s: float | None = None
    ) -> None:
        """Fill `tensor` with the bytes of `root`'s."""
        options = self._options(BroadcastOptions(), timeout_s)
        options.rootRank = root
        self._run(
            "a broadcast", lambda backend: backend.broadcast([as_bytes(tensor)], options), timeout_s
        )

    def all_reduce(self, tensor: torch.Tensor, *, timeout_s: float | None = None) -> None:
        """Replace `tensor` (contiguous) by the sum over the members; the same bits on all of them."""
        options = self._options(AllreduceOptions(), timeout_s)
        self._run("an all_reduce", lambda backend: backend.allreduce([tensor], options), timeout_s)

    def all_gather(
        self, output: torch.Tensor, tensor: torch.Tensor, *, timeout_s: float | None = None
    ) -> None:
        """Fill `output` with the members' `tensor`s, one after another in rank order."""
        options = self._options(AllgatherOptions(), timeout_s)
        self._run(
            "an all_gather",
            lambda backend: backend._allgather_base(as_bytes(output), as_bytes(tensor), options),
            timeout_s,
        )

    def gather(
        self,
        outputs: list[torch.Tensor],
        tensor: torch.Tensor,
        *,
        root: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Fill `outputs` (one per member on `root`, none elsewhere) with the members' `tensor`s."""
        options = self._options(GatherOptions(), timeout_s)
        options.rootRank = root
        into = [[as_bytes(output) for output in outputs]] if self.rank == root else []
        self._run(
            "a gather", lambda backend: backend.gather(into, [as_bytes(tensor)], options), timeout_s
        )

    def send(self, tensor: torch.Tensor, to: int, *, timeout_s: float | None = None) -> None:
        """Send to one member, which must `receive` as many bytes."""
        self._run(
            f"a send to rank {to}",
            lambda backend: backend.send([as_bytes(tensor)], to, 0),
            timeout_s,
        )

    def receive(self, tensor: torch.Tensor, source: int, *, timeout_s: float | None = None) -> None:
        """Fill `tensor` with what `source` sends."""
        self._run(
            f"a receive from rank {source}",
            lambda backend: backend.recv([as_bytes(tensor)], source, 0),
            timeout_s,
        )

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Wait until every member is here."""
        options = self._options(BarrierOptions(), timeout_s)
        self._run("a barrier", lambda backend: backend.barrier(options), timeout_s)

    def abort(self) -> None:
        """Make operations that are under way fail, where the backend can (gloo's end at their deadlines)."""
        backend = self._held.backend
        if backend is not None and self.kind == "nccl":
            try:
                backend.abort()
            except RuntimeError:
                pass  # it was aborted before

    def close(self) -> None:
        """Close the connections, so that peers fail at once; waits for operations that are under way."""
        self.abort()
        self._held.backend = None

    def _options(self, options: Any, timeout_s: float | None) -> Any:
        options.timeout = timedelta(seconds=self.timeout_s if timeout_s is None else timeout_s)
        return options

    def _run(self, what: str, start: Callable[[Any], Any], timeout_s: float | None) -> None:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        work = self._started(what, start)
        try:
            if self.kind == "nccl":
                work.wait()  # orders streams; with a timeout it would wait on the host
            else:
                work.wait(timedelta(seconds=limit_s))
        except RuntimeError as error:
            raise self._error(what, error) from error
        finally:
            self._held.num_under_way -= 1

    def _started(self, what: str, start: Callable[[Any], Any]) -> Any:
        if self._held.backend is None:
            raise TransportError(
                f"group {self.name!r}: got {what} after it was closed, expected an open group; make a new one"
            )
        self._held.num_under_way += 1
        try:
            return start(self._held.backend)
        except RuntimeError as error:
            self._held.num_under_way -= 1
            raise self._error(what, error) from error

    def _finished(self, what: str, work: Any, end: float) -> None:
        try:
            if self.kind == "gloo":
                work.wait(left(end))
                return
            while not work.is_completed():
                if time.monotonic() >= end:
                    self.abort()
                    raise DeadlineExceeded(self._late(what))
                time.sleep(_NCCL_POLL_S)
            if not work.is_success():
                raise TransportError(self._lost(what, "the communicator failed or was aborted"))
        except RuntimeError as error:
            if isinstance(error, (TransportError, DeadlineExceeded)):
                raise
            raise self._error(what, error) from error
        finally:
            self._held.num_under_way -= 1

    def _error(self, what: str, error: RuntimeError) -> TransportError | DeadlineExceeded:
        text = first_line(error)
        if "timed out" in text.lower() or "timeout" in text.lower():
            return DeadlineExceeded(self._late(what))
        return TransportError(self._lost(what, text))

    @property
    def _me(self) -> str:
        return f"group {self.name!r}, rank {self.rank} of {self.size}"

    def _late(self, what: str) -> str:
        return (
            f"{self._me}: got no end of {what} by its deadline, expected every member to take part; look for one that "
            "is late or stopped, and make a new group"
        )

    def _lost(self, what: str, text: str) -> str:
        return (
            f"{self._me}: {what} failed, got {text!r}, expected every member to live; look for one that died, and make "
            "a new group"
        )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of any dtype and shape as a flat uint8 view of the same memory."""
    return tensor.view(-1).view(torch.uint8)
