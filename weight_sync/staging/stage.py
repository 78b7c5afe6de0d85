"""Where the bytes of one session wait, from the trainer's announcement until the commit writes them.

Two kinds: the trainer's own arena, where both ends see it (`ArenaStage`), and memory of this rank, where bytes arrive
over a group (`shadow_stage.ShadowStage`). A session does not know which of them it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import torch

from ..devices.side_streams import side_stream
from ..errors import ProtocolError, TransportError
from ..plan.plan import Plan

Check = Callable[[np.ndarray, np.ndarray], None]
"""`check(rows, values)` raises unless `values` (N,) uint64 are the fingerprints to expect of `rows` (N,)."""

Fill = Callable[[torch.Tensor], "Future[Any]"]
"""Receives into memory, which is whole when the future is done."""


Written = Callable[[], np.ndarray]
"""Fingerprints, (N,) uint64; waits for the write."""


class Stage(Protocol):
    """Used by the receiver's thread; `write` by the engine loop's, while the other waits."""

    @property
    def in_parts(self) -> bool:
        """This rank has staged the parts that it keeps, and checked nothing: all ranks do together, before the write.
        The same on all of them."""

    def accept(
        self, rows: np.ndarray, check: Check, timeout_s: float, at: int | None = None
    ) -> float:
        """Have these tensors of the manifest, whole and checked, or raise; seconds of work, without waiting.

        `at`: where they begin in an arena that holds less than the model (`Bucket.at`).
        """

    def receive(self, num_bytes: int, fill: Fill) -> torch.Tensor:
        """Bytes that nobody has declared, uint8, once `fill` has received them; valid until the stage takes others."""

    def put(self, sources: Mapping[int, torch.Tensor]) -> np.ndarray:
        """Take tensors by row, cast to the manifest's dtypes; their fingerprints (N,) uint64, rows ascending."""

    def summands(self, rows: np.ndarray | None) -> np.ndarray:
        """This rank's summands of the fingerprints of these rows (None: all), as they are staged, (N,) uint64; where it
        stages in parts."""

    def write(self, rows: np.ndarray | None, *, read_back: bool = False) -> Written | None:
        """Write these rows (None: all of the manifest) into the parameters. Returns when every copy was issued.

        `read_back`: what it returns has the fingerprints of what is in the parameters then, in the order of the rows,
        if it had to look at them anyway.
        """

    def after_write(self) -> None:
        """Whatever this thread asks of the GPU from now on comes after the write, whichever thread issued that."""

    def can_take_back(self) -> bool:
        """Whether what was resident before the write is still there, whole, and can be resident again."""

    def take_back(self) -> None:
        """Make it so."""

    def release(self) -> None:
        """The session is over: hold nothing any more. Safe to repeat."""


class WriteMark:
    """The end of a write that a GPU may still be carrying out."""

    def __init__(self) -> None:
        self._end: torch.cuda.Event | None = None
        self._device: torch.device | None = None

    def record(self, device: torch.device) -> None:
        """Everything that this thread's stream has been given up to now belongs to the write."""
        if device.type == "cuda":
            self._end, self._device = torch.cuda.Event(), device
            self._end.record(torch.cuda.current_stream(device))

    def follow(self) -> None:
        """This thread's stream of that device, which need not be its current one, goes on behind it."""
        if self._end is not None:
            self._end.wait(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Until it is over."""
        if self._end is not None:
            self._end.synchronize()
            self._end = None


class ArenaStage:
    """The trainer's arena, in place: nothing is copied before the commit.

    The trainer could still change it after the check, which is what the check of the resident bytes is for.
    """

    in_parts = False

    def __init__(self, buffer: torch.Tensor, plan: Plan) -> None:
        check_size(buffer.numel(), plan)
        self.plan = plan
        """How it is written."""
        self._buffer = buffer[: plan.manifest.arena_bytes]
        self._mark = WriteMark()
        self._checks = side_stream(buffer.device, "checks")

    def accept(
        self, rows: np.ndarray, check: Check, timeout_s: float, at: int | None = None
    ) -> float:
        refuse_window(at)
        start = time.perf_counter()
        num_tensors = len(self.plan.manifest.tensors)
        # Asking for all of them, in their order, is much cheaper.
        ascending = bool((np.diff(rows.astype(np.int64)) == 1).all())
        wanted = None if len(rows) == num_tensors and ascending else rows
        # A stream of its own: generation does not wait for the check.
        with torch.cuda.stream(self._checks):
            values = as_uint64(self.plan.staged_fingerprints(self._buffer, wanted))
        check(rows, values)
        return time.perf_counter() - start

    def receive(self, num_bytes: int, fill: Fill) -> torch.Tensor:
        raise self.not_over_a_group()

    def put(self, sources: Mapping[int, torch.Tensor]) -> np.ndarray:
        raise self.not_over_a_group()

    @staticmethod
    def not_over_a_group() -> ProtocolError:
        """The refusal of what only a stage over a group can take."""
        return ProtocolError(
            "Receive needs a session whose arena belongs to a group: got one that trainer and engine share; open an "
            "arena with a GroupHandle"
        )

    def summands(self, rows: np.ndarray | None) -> np.ndarray:
        raise AssertionError("whole tensors were checked")

    def write(self, rows: np.ndarray | None, *, read_back: bool = False) -> Written | None:
        read = None
        if read_back and rows is None:
            read = self.plan.replay_and_read(self._buffer)
        else:
            self.plan.replay(self._buffer, rows)
        self._mark.record(self._buffer.device)
        return None if read is None else lambda: as_uint64(read())

    def after_write(self) -> None:
        self._mark.follow()

    def can_take_back(self) -> bool:
        return False

    def take_back(self) -> None:
        raise AssertionError("it was written over")

    def tensors(self, rows: np.ndarray) -> dict[int, torch.Tensor]:
        """These tensors, by row, as they lie in the arena."""
        views = self.plan.manifest.views(self._buffer)
        return {row: views[row] for row in rows.tolist()}

    def release(self) -> None:
        self._mark.wait()  # whoever owns the arena may write into it from now on
        self._buffer = torch.empty(0, dtype=torch.uint8)


def check_size(num_bytes: int, plan: Plan) -> None:
    """`TransportError` unless an arena of `num_bytes` has room for the plan's manifest."""
    needed = plan.manifest.arena_bytes
    if num_bytes < needed:
        raise TransportError(
            f"the arena is too small: got {num_bytes} bytes, expected {needed}; make one for this manifest"
        )


def refuse_window(at: int | None) -> None:
    """`ProtocolError` where a bucket has a place of its own although the arena holds the model."""
    if at is not None:
        raise ProtocolError(
            f"a bucket has its place from the manifest: got at={at}, expected None; only an arena that was opened as a "
            "window has others"
        )


def as_uint64(values: torch.Tensor) -> np.ndarray:
    """Fingerprints, which torch keeps as int64, as what they are."""
    return values.cpu().contiguous().numpy().view(np.uint64)
