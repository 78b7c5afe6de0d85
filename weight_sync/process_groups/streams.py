"""Runs of broadcasts from rank 0, several under way at once, with work done on one part while others travel."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import torch

from ..errors import DeadlineExceeded
from .communicator import Communicator, Posted
from .landing import Landing, can_guard, forwards


def send_parts(
    communicator: Communicator,
    parts: Sequence[torch.Tensor],
    *,
    depth: int,
    end: float,
    prepare: Callable[[int], None] | None = None,
) -> None:
    """Rank 0: broadcast `parts` in order, at most `depth` at once; `prepare(i)` runs before part i is sent.

    On return the parts may be written again. While `prepare` works on one part, those before it travel.
    """
    window: deque[Posted] = deque()
    try:
        for i, part in enumerate(parts):
            if len(window) >= depth:
                window.popleft().wait()
            if prepare is not None:
                prepare(i)
            left_s = end - time.monotonic()
            window.append(communicator.post_broadcast(part, root=0, timeout_s=left_s))
        while window:
            window.popleft().wait()
    finally:
        window.clear()  # what is under way holds connections open


def receive_parts(
    communicator: Communicator,
    parts: Sequence[torch.Tensor],
    *,
    depth: int,
    end: float,
    on_part: Callable[[int], None] | None = None,
    scratch_behind: bool = False,
) -> None:
    """Fill uint8 `parts` with what rank 0 sends, in order; `on_part(i)` runs on another thread once part i is whole.

    Parts may lie over each other (two buffers that take turns): a part is received only after `on_part` has returned
    for every earlier one that shares memory with it. On return all of them have returned; what they raise is raised
    here. With `scratch_behind`, lengths are checked where they can be, one part at a time (see `landing`).
    """
    receiver = _Receiver(communicator, end, scratch_behind, on_part)
    with receiver:
        for i, part in enumerate(parts):
            receiver.make_way(part, depth)
            receiver.post(i, part)
        receiver.finish()


class _Receiver:
    """The state of one `receive_parts`."""

    def __init__(
        self,
        communicator: Communicator,
        end: float,
        scratch_behind: bool,
        on_part: Callable[[int], None] | None,
    ) -> None:
        self._callbacks = ThreadPoolExecutor(1, thread_name_prefix="received-parts")
        self._communicator = communicator
        self._end = end
        self._on_part = on_part
        self._guarded = (
            scratch_behind
            and communicator.kind == "gloo"
            and not forwards(communicator.rank, communicator.size)
        )
        self._window: deque[tuple[int, torch.Tensor, Posted, Landing | None]] = deque()
        self._called: deque[tuple[torch.Tensor, Future[None]]] = deque()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self._window.clear()  # what is under way holds connections open
        self._callbacks.shutdown(wait=True, cancel_futures=True)

    def make_way(self, part: torch.Tensor, depth: int) -> None:
        """Wait until `part` may be posted: few enough are under way, and nobody uses its memory."""
        if self._guarded:
            depth = 1  # what is behind a part is scratch until it has been checked
        while len(self._window) >= depth or any(_overlap(part, w[1]) for w in self._window):
            self._complete_first()
        while self._called and self._called[0][1].done():
            self._called.popleft()[1].result()
        while any(_overlap(part, busy) for busy, _ in self._called):
            self._await_first_callback()

    def post(self, i: int, part: torch.Tensor) -> None:
        landing = Landing(part) if self._guarded and can_guard(part) else None
        posted = self._communicator.post_broadcast(
            part if landing is None else landing.posted,
            root=0,
            timeout_s=self._end - time.monotonic(),
        )
        self._window.append((i, part, posted, landing))

    def finish(self) -> None:
        while self._window:
            self._complete_first()
        while self._called:
            self._await_first_callback()

    def _complete_first(self) -> None:
        i, part, posted, landing = self._window.popleft()
        posted.wait()
        if landing is not None:
            landing.check(f"group {self._communicator.name!r}, part {i}")
        if self._on_part is not None:
            self._called.append((part, self._callbacks.submit(self._on_part, i)))

    def _await_first_callback(self) -> None:
        _, called = self._called.popleft()
        try:
            called.result(timeout=max(0.0, self._end - time.monotonic()))
        except FutureTimeout:
            if called.done():
                raise  # the callback's own
            raise DeadlineExceeded(
                f"group {self._communicator.name!r}: got no end of the work on a received part by the deadline, "
                "expected it to be quicker than the wire; raise the timeout"
            ) from None


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous uint8 tensors share bytes."""
    start, other_start = one.data_ptr(), other.data_ptr()
    return start < other_start + other.numel() and other_start < start + one.numel()
