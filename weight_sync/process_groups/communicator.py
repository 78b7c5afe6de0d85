"""gloo and NCCL communicators made by the backend's own constructor, with a deadline on every operation.

Bytes are what travels: except in sums, tensors are handed over as uint8, so every dtype works on every backend.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceScatterOptions,
)

from ..errors import DeadlineExceeded, SyncError, TransportError
from ..time_left import left, left_s
from .rendezvous import first_line

_NCCL_POLL_S = 0.0002
_NCCL_SPIN_S = 0.002
"""A part takes a fraction of this over a link between GPUs, and as long as nobody sees its end, the link rests."""
_SHORTEST_S = 0.001
"""torch takes a timeout of zero for none."""


class Posted:
    """An operation that was started and not yet waited for.

    Its work keeps the group's connections open. It is let go of as soon as its end is known, because an error that is
    kept somewhere keeps everything that was on the stack.
    """

    def __init__(self, communicator: Communicator, what: str, work: Any, end: float) -> None:
        self._communicator = communicator
        self._what = what
        self._work: Any = work
        self._end = end

    def wait(self) -> None:
        """Until the buffer is whole (receiver) or free again (sender), seen from the host."""
        try:
            if self._communicator.kind == "gloo":
                self._work.wait(left(self._end))
            else:
                self._wait_for_nccl()
        except RuntimeError as error:
            if isinstance(error, SyncError):
                raise
            raise self._communicator._error(self._what, error) from error
        finally:
            self._let_go()

    def wait_on_stream(self) -> None:
        """Until operations that follow on the same device see the result; over gloo the same as `wait`."""
        if self._communicator.kind == "gloo":
            self.wait()
            return
        try:
            if self._work is not None:  # None: it is on the current stream
                self._work.wait()  # orders streams; with a timeout it would wait on the host
        except RuntimeError as error:
            raise self._communicator._error(self._what, error) from error
        finally:
            self._let_go()

    def _wait_for_nccl(self) -> None:
        naps_from = time.monotonic() + _NCCL_SPIN_S
        while not self._work.is_completed():
            now = time.monotonic()
            if now >= self._end:
                self._communicator.abort()
                raise DeadlineExceeded(self._communicator._late(self._what))
            time.sleep(_NCCL_POLL_S if now >= naps_from else 0.0)
        self._work.wait(left(self._end))  # returns at once, or raises what went wrong

    def _let_go(self) -> None:
        self._work = None
        self._communicator._held.num_under_way -= 1


class _Held:
    """A backend that is let go of before the interpreter ends.

    gloo's threads touch tensors; one that does so while Python is being torn down ends the process with an abort.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.num_under_way = 0

    def drop(self) -> None:
        """Let go; blocks while something is under way, because the backend's destructor does."""
        self.backend = None

    def drop_if_idle(self) -> None:
        """A busy one is left to the end of the process."""
        if self.num_under_way == 0:
            self.drop()


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
        self._aborting = False
        weakref.finalize(self, self._held.drop_if_idle)

    def post_broadcast(self, tensor: torch.Tensor, *, root: int, timeout_s: float) -> Posted:
        """Start to send `tensor`, if this is `root`, or to fill it; contiguous, as many bytes on every member.

        Members must post in the same order; several may be under way.
        """
        options = self._options(BroadcastOptions(), timeout_s)
        options.rootRank = root
        return self._start(
            f"a broadcast of {tensor.nbytes} bytes",
            lambda backend: backend.broadcast([as_bytes(tensor)], options),
            timeout_s,
        )

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
        options = self._in_place(AllreduceOptions(), timeout_s)
        self._run("an all_reduce", lambda backend: backend.allreduce([tensor], options), timeout_s)

    def reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, *, timeout_s: float | None = None
    ) -> None:
        """Fill `output` with this member's part of the sum of the members' `tensor`s, which have one for each."""
        if self.kind == "gloo":
            total = tensor.clone()
            self.all_reduce(total, timeout_s=timeout_s)
            output.view(-1).copy_(total.view(self.size, -1)[self.rank])
            return
        options = self._options(ReduceScatterOptions(), timeout_s)
        self._run(
            "a reduce_scatter",
            lambda backend: backend._reduce_scatter_base(output, tensor, options),
            timeout_s,
        )

    def all_gather(
        self, output: torch.Tensor, tensor: torch.Tensor, *, timeout_s: float | None = None
    ) -> None:
        """Fill `output` with the members' `tensor`s, one after another in rank order."""
        options = self._in_place(AllgatherOptions(), timeout_s)
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
        """Make operations that are under way fail, where the backend can (gloo's end at their deadlines). Never blocks.

        NCCL's kernels end as soon as they see its flag. What comes after that, giving back what a member shared that
        may be dead, takes it seconds, and is left to a thread of its own; see `wait_for_aborts`.
        """
        backend = self._held.backend
        if backend is None or self.kind != "nccl":
            return
        with _aborts_lock:
            if not self._aborting:
                self._aborting = True
                if not _aborts:
                    # A thread that is inside NCCL when the interpreter ends takes the process down with a signal.
                    atexit.unregister(wait_for_aborts)
                    atexit.register(wait_for_aborts, _EXIT_WAIT_S)
                _aborts[:] = [thread for thread in _aborts if thread.is_alive()]
                _aborts.append(
                    threading.Thread(
                        target=_abort, args=(backend,), name=f"{self.name}-aborting", daemon=True
                    )
                )
                _aborts[-1].start()

    def close(self) -> None:
        """Close the connections, so that peers fail; at once, or when what is under way has ended. Never blocks."""
        self.abort()
        if self._held.num_under_way == 0:
            self._held.drop()
        else:  # the backend's destructor waits
            closing = threading.Thread(
                target=self._held.drop, name=f"{self.name}-closing", daemon=True
            )
            closing.start()
            with _aborts_lock:
                _closings[:] = [thread for thread in _closings if thread.is_alive()]
                _closings.append(closing)

    def _options(self, options: Any, timeout_s: float | None) -> Any:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        options.timeout = timedelta(seconds=max(limit_s, _SHORTEST_S))
        return options

    def _in_place(self, options: Any, timeout_s: float | None) -> Any:
        """Options of an operation that NCCL is to run on the current stream itself, not on one of its own beside it."""
        options.asyncOp = False
        return self._options(options, timeout_s)

    def _run(self, what: str, start: Callable[[Any], Any], timeout_s: float | None) -> None:
        self._start(what, start, timeout_s).wait_on_stream()

    def _start(self, what: str, start: Callable[[Any], Any], timeout_s: float | None) -> Posted:
        backend = self._held.backend
        if backend is None:
            raise TransportError(
                f"group {self.name!r}: got {what} after it was closed, expected an open group; make a new one"
            )
        end = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        self._held.num_under_way += 1
        try:
            return Posted(self, what, start(backend), end)
        except RuntimeError as error:
            self._held.num_under_way -= 1
            raise self._error(what, error) from error
        finally:
            del backend  # see `Posted`

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
        if "Duplicate GPU" in text:
            return (
                f"{self._me}: {what} failed, got {text!r}, expected a GPU for every member (NCCL before 2.30); on one "
                "machine use transport='shared_memory', elsewhere group_backend='gloo'"
            )
        return (
            f"{self._me}: {what} failed, got {text!r}, expected every member to live; look for one that died, and make "
            "a new group"
        )


_aborts: list[threading.Thread] = []
_closings: list[threading.Thread] = []
"""Each waits until the operations of a group that was closed have ended."""
_aborts_lock = threading.Lock()
_EXIT_WAIT_S = 10.0


def wait_for_aborts(timeout_s: float) -> bool:
    """Until no communicator of this process is being aborted any more; False when that takes longer.

    Before a new one is made: NCCL frees memory of the GPU in both, which waits for the kernels of the other.
    """
    end = time.monotonic() + timeout_s
    with _aborts_lock:
        threads = list(_aborts)
    for thread in threads:
        thread.join(left_s(end))
    return not any(thread.is_alive() for thread in threads)


def keep_until_aborted(memory: object, left: Callable[[], object] | None = None) -> None:
    """Keep what operations of a group that was given up may still read or write, until they certainly do not.

    `left()` returns when the group's own thread has ended, which gloo may hold until the deadline.
    """
    if left is None and not _ending():
        return

    def hold(held: list[object]) -> None:
        if left is not None:
            left()
        for thread in _ending():
            thread.join()
        held.clear()

    threading.Thread(target=hold, args=([memory],), name="group-memory", daemon=True).start()


def _ending() -> list[threading.Thread]:
    with _aborts_lock:
        return [thread for thread in _aborts + _closings if thread.is_alive()]


def _abort(backend: Any) -> None:
    with suppress(RuntimeError):  # it has failed before
        backend.abort()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of any dtype and shape as a flat uint8 view of the same memory."""
    return tensor.view(-1).view(torch.uint8)
