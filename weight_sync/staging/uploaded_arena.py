"""An arena in memory of the host for parameters on a GPU: uploaded while generation goes on, written from the GPU.

The engine registers its mapping of the arena with CUDA once, so that copies run at the link's rate and by themselves.
Each bucket's tensors go up in chunks into this rank's stage, are checked there, and wait for the commit in a shadow of
the parameters, as those that come over a group do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from ..devices.registration import Registration
from ..devices.side_streams import side_stream
from ..errors import DeadlineExceeded, ProtocolError
from ..layout.memory import Range
from ..plan.plan import Plan
from ..transports.chunks import chunks_of, ranges_of_chunk
from ..transports.shared_memory import MappedMemoryFile
from ..wire.messages import SharedMemoryHandle
from .shadow_plan import Chunk, ShadowPlan
from .shadow_stage import StageMemory
from .stage import ArenaStage, Check, WriteMark, check_size, refuse_window


def needs_upload(device: torch.device) -> bool:
    """Whether parameters on `device` are better written from a stage than from memory of the host."""
    return device.type == "cuda"


class OpenedUploadedArena(MappedMemoryFile):
    """An engine rank's end: the trainer's memory file, registered, and a hold on the rank's stage memory."""

    _writable = True  # what is registered must be

    def __init__(self, handle: SharedMemoryHandle, memory: StageMemory) -> None:
        memory.hold(sparing=True)
        self._memory: StageMemory | None = memory
        self.unstaged = memory.unstaged
        self._registration: Registration | None = None
        try:
            super().__init__(handle)
            self._registration = Registration.of(self.buffer, memory.device)
        except BaseException:
            self._let_go()
            raise

    def stage(self, plan: Plan) -> UploadedStage:
        assert self._memory is not None, "the arena was closed"
        check_size(self.buffer.numel(), plan)
        return UploadedStage(self._memory, self.buffer, plan)

    def close(self) -> None:
        if self._registration is not None:
            self._registration.end()
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.let_go()


class UploadedStage:
    """The stage of a session whose bytes do not stay where they are: in memory of the host, or in a window."""

    in_parts = False

    def __init__(
        self, memory: StageMemory, buffer: torch.Tensor, plan: Plan, *, is_window: bool = False
    ) -> None:
        """`is_window`: the arena holds less than the model, and every bucket says where it is."""
        self._is_window = is_window
        self.plan = plan
        """What writes it."""
        self.memory = memory
        """Where it keeps them."""
        self._manifest = plan.manifest
        self._buffer = buffer
        self._plan: ShadowPlan | None = memory.plan(plan)
        self._mark = WriteMark()
        self._uploads = side_stream(memory.device, "uploads")
        self._checks = side_stream(memory.device, "checks")

    def accept(
        self, rows: np.ndarray, check: Check, timeout_s: float, at: int | None = None
    ) -> float:
        self._check_place(rows, at)
        start = time.perf_counter()
        for chunk, incoming, arrived in self._uploaded(rows, at):
            with torch.cuda.stream(self._checks):
                if arrived is not None:
                    arrived.wait()
                check(chunk.rows, chunk.fingerprints(incoming))
                self.memory.before_move()
                chunk.move(incoming)
            if self._checks is not None:  # before the receive buffer is written again
                self._checks.synchronize()
            if time.perf_counter() - start > timeout_s:
                raise DeadlineExceeded(
                    f"the bucket was not uploaded within the session's lease of {timeout_s:.3f} s; send smaller ones, "
                    "or raise lease_s"
                )
        return time.perf_counter() - start

    def receive(self, num_bytes: int, fill: object) -> torch.Tensor:
        raise ArenaStage.not_over_a_group()

    def put(self, sources: object) -> np.ndarray:
        raise ArenaStage.not_over_a_group()

    def summands(self, rows: np.ndarray | None) -> np.ndarray:
        raise AssertionError("whole tensors were checked")

    def write(self, rows: np.ndarray | None, *, read_back: bool = False) -> None:
        assert self._plan is not None, "the session has ended"
        self._plan.write(rows)
        self._mark.record(self.memory.device)

    def after_write(self) -> None:
        self._mark.follow()

    def can_take_back(self) -> bool:
        return self._plan is not None and self._plan.can_take_back()

    def take_back(self) -> None:
        assert self._plan is not None, "the session has ended"
        self._plan.take_back()

    def release(self) -> None:
        self._mark.wait()
        if self._uploads is not None:  # the trainer may write into its arena from now on
            self._uploads.synchronize()
        self._plan, self._buffer = None, torch.empty(0, dtype=torch.uint8)
        self.memory.session_over()

    def _check_place(self, rows: np.ndarray, at: int | None) -> None:
        """`ProtocolError` unless a bucket has a place of its own exactly where the arena is a window."""
        if not self._is_window:
            refuse_window(at)
        elif at is None or (np.diff(rows.astype(np.int64)) <= 0).any():
            raise ProtocolError(
                f"a bucket of a window has a place and ascending indices: got at={at} and {len(rows)} indices; both "
                "sides must run the same release"
            )

    def _check_range(self, end: int) -> None:
        """`ProtocolError` where a bucket ends behind the arena."""
        if end > self._buffer.numel():
            raise ProtocolError(
                f"a bucket reaches out of its arena: got bytes to {end}, expected at most {self._buffer.numel()}; both "
                "sides must run the same release"
            )

    def _uploaded(
        self, rows: np.ndarray, at: int | None
    ) -> Iterator[tuple[Chunk, torch.Tensor, torch.cuda.Event | None]]:
        """Each chunk, and the event that says it is there; the next one is under way by then."""
        assert self._plan is not None, "the session has ended"
        held: tuple[Chunk, torch.Tensor, torch.cuda.Event | None] | None = None
        for number, part in enumerate(chunks_of(self._manifest, rows)):
            chunk = self._plan.chunk(part)
            size = chunk.manifest.arena_bytes
            ranges = ranges_of_chunk(self._manifest, part) if at is None else [(at, at + size)]
            if ranges:
                self._check_range(ranges[-1][1])
            incoming = chunk.home
            if incoming is None:
                incoming = self.memory.incoming(number % 2, size)
            uploaded = chunk, incoming, self._upload(ranges, incoming)
            at = None if at is None else at + size
            if held is not None:
                yield held
            held = uploaded
        if held is not None:
            yield held

    def _upload(self, ranges: list[Range], incoming: torch.Tensor) -> torch.cuda.Event | None:
        done = 0
        with torch.cuda.stream(self._uploads):
            for start, stop in ranges:
                part = incoming[done : done + stop - start]
                part.copy_(self._buffer[start:stop], non_blocking=True)
                done += stop - start
            if self._uploads is None:
                return None
            event = torch.cuda.Event()
            event.record(self._uploads)
        return event
