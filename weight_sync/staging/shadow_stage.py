"""A stage of this rank's own, for bytes that arrive over a group: two receive buffers and a shadow of the parameters.

    wire -> receive buffer, a chunk of whole tensors -> fingerprints checked -> plan -> shadow | commit -> parameters

While one chunk is checked and moved, the next one arrives in the other buffer. What this takes is the bytes that the
rank keeps and two chunks, however large the model is: a rank receives every byte and keeps its part. A chunk that the
rank keeps as it travels (one rank alone, as a rule) lands in the shadow itself. A trainer that declares nothing needs a
receive buffer for its largest call.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..devices.room import can_spare
from ..errors import TransportError
from ..layout.weight_map import WeightMap
from ..plan.plan import Plan
from ..process_groups.communicator import keep_until_aborted
from ..process_groups.parts import receive_buffer
from ..time_left import left_s
from ..transports.chunks import chunks_of
from .joined_group import JoinedGroup
from .shadow import Shadow
from .shadow_plan import Chunk, ShadowPlan
from .stage import Check, Fill, WriteMark, check_size, refuse_window

_KEPT_PLANS = 4


class NoStageMemory(TransportError):
    """There is no room for the rank's weights once more."""


class StageMemory:
    """The memory of all stages of one rank, which has one session at a time. There while somebody holds it."""

    unstaged = False
    """What is checked goes into the parameters at once: an update must be complete."""

    def __init__(self, weight_map: WeightMap, device: torch.device) -> None:
        self._weight_map = weight_map
        self._device = device
        self._num_holders = 0
        self._shadow: Shadow | None = None
        self._incoming: dict[int, torch.Tensor] = {}
        self._plans: OrderedDict[str, ShadowPlan] = OrderedDict()
        self.wait: Callable[[Future[Any]], Any] = Future.result
        """How this thread waits for a trainer's bytes: the result of a future. It may do other things meanwhile."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and their shadow."""
        return self._device

    @property
    def num_bytes(self) -> int:
        """What it takes now: this rank's parameters once, and the largest chunk of each receive buffer."""
        incoming = sum(buffer.numel() for buffer in self._incoming.values())
        return incoming + (0 if self._shadow is None else self._shadow.num_bytes)

    @property
    def shadow_bytes(self) -> int:
        """What it takes at least: this rank's parameters once."""
        return sum(tensor.nbytes for tensor in self._weight_map.parameters.values())

    def hold(self, *, sparing: bool = False) -> None:
        """Somebody needs it from now on; `NoStageMemory`. `sparing`: who can do without it leaves some for steps."""
        if sparing and self._shadow is None and not can_spare(self._device, self.shadow_bytes):
            raise NoStageMemory(
                f"no memory on {self._device} to stage an update: got too little for {self.shadow_bytes} bytes, "
                "expected that and some for the steps; lower kv_cache_bytes or mem_fraction_static"
            )
        self._existing_shadow()
        self._num_holders += 1

    def let_go(self) -> None:
        """One of them does not any more; the last one gives it back."""
        self._num_holders -= 1
        if not self._num_holders:
            self.forget()

    def incoming(self, which: int, num_bytes: int) -> torch.Tensor:
        """Receive buffer 0 or 1, uint8, cut to `num_bytes`; what was in it may be gone.

        `TransportError` when there is no memory for it.
        """
        buffer = self._incoming.get(which)
        if buffer is None or buffer.numel() < num_bytes:
            self._incoming.pop(which, None)
            del buffer  # before there is another one
            with _no_memory_is_an_answer(num_bytes, self._device):
                self._incoming[which] = buffer = (
                    receive_buffer(num_bytes)
                    if self._device.type == "cpu"
                    else torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                )
            self.wait_for_device()  # steps may still use what was there; uploads come on another stream
        return buffer[:num_bytes]

    def forget(self, keep: Callable[[object], None] = keep_until_aborted) -> None:
        """Use none of it again: a thread of a group may still write into it, for longer than anybody waits for that.

        `keep` holds it until then: no view of a shadow that is mapped does.
        """
        if self._shadow is not None or self._incoming:
            keep((self._shadow, list(self._incoming.values())))
        self._shadow = None
        self._incoming.clear()
        self._plans.clear()

    def plan(self, plan: Plan) -> ShadowPlan:
        """The way of this plan's tensors through the shadow, worked out once."""
        digest = plan.manifest.digest
        known = self._plans.get(digest)
        if known is None:
            known = self._plans[digest] = ShadowPlan(plan, self._existing_shadow())
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(digest)
        return known

    def before_move(self) -> None:
        """Checked bytes are about to be put where they wait. The receiver's thread."""

    def session_over(self) -> None:
        """The session that had a plan of it has ended. Safe to repeat."""

    def wait_for_device(self) -> None:
        """Wait for the device: the copies of a stage are done before any other stream or thread looks."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _existing_shadow(self) -> Shadow:
        if self._shadow is None:
            with _no_memory_is_an_answer(self.shadow_bytes, self._device):
                self._shadow = Shadow(self._weight_map)
            self.wait_for_device()  # its zeros are written before any other stream writes there
        return self._shadow


@contextmanager
def _no_memory_is_an_answer(num_bytes: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NoStageMemory(
            f"no memory on {device} to stage an update: got none for {num_bytes} bytes, expected room for "
            "the rank's weights once more and two chunks; lower kv_cache_bytes or mem_fraction_static"
        ) from error


class ShadowStage:
    """The stage of a session that `group` fills."""

    in_parts = False

    def __init__(self, memory: StageMemory, group: JoinedGroup, num_bytes: int, plan: Plan) -> None:
        check_size(num_bytes, plan)
        self._memory = memory
        self._group = group
        self._manifest = plan.manifest
        self._plan: ShadowPlan | None = memory.plan(plan)
        self._receiving = False  # something may be writing into the memory
        self._mark = WriteMark()

    def accept(
        self, rows: np.ndarray, check: Check, timeout_s: float, at: int | None = None
    ) -> float:
        refuse_window(at)
        end = time.monotonic() + timeout_s
        failure: Exception | None = None
        work_s = 0.0
        self._receiving = True
        for chunk, incoming in self._arriving(self._chunks(rows), end):
            if failure is not None:  # the rest is received all the same: the group stays in step
                continue
            start = time.perf_counter()
            try:
                check(chunk.rows, chunk.fingerprints(incoming))
                self._memory.before_move()
                chunk.move(incoming)
            except Exception as error:
                failure = error
            work_s += time.perf_counter() - start
        self._receiving = False
        if failure is not None:
            raise failure
        self._memory.wait_for_device()
        return work_s

    def receive(self, num_bytes: int, fill: Fill) -> torch.Tensor:
        with _no_memory_is_an_answer(num_bytes, self._group.device):
            landing = self._group.landing(num_bytes)
        incoming = self._memory.incoming(0, num_bytes) if landing is None else landing
        self._receiving = True
        self._memory.wait(fill(incoming))
        self._receiving = False
        return incoming

    def put(self, sources: Mapping[int, torch.Tensor]) -> np.ndarray:
        found = [np.empty(0, dtype=np.uint64)]
        for chunk in self._chunks(np.array(sorted(sources), dtype=np.int64)):
            incoming = self._place(chunk, 1)
            with torch.no_grad():
                torch._foreach_copy_(
                    chunk.manifest.views(incoming), [sources[row] for row in chunk.rows.tolist()]
                )
            found.append(chunk.fingerprints(incoming))
            self._memory.before_move()
            chunk.move(incoming)
        self._memory.wait_for_device()
        return np.concatenate(found)

    def summands(self, rows: np.ndarray | None) -> np.ndarray:
        raise AssertionError("whole tensors were checked")

    def write(self, rows: np.ndarray | None, *, read_back: bool = False) -> None:
        assert self._plan is not None, "the session has ended"
        self._plan.write(rows)
        self._mark.record(self._memory.device)

    def after_write(self) -> None:
        self._mark.follow()

    def can_take_back(self) -> bool:
        return self._plan is not None and self._plan.can_take_back()

    def take_back(self) -> None:
        assert self._plan is not None, "the session has ended"
        self._plan.take_back()

    def release(self) -> None:
        self._mark.wait()
        if self._receiving:  # in vain: what comes now belongs to nothing
            self._group.destroy(wait_s=0.0)
            self._memory.forget(self._group.keep_until_left)
        self._receiving, self._plan = False, None
        self._memory.session_over()

    def _chunks(self, rows: np.ndarray) -> Iterator[Chunk]:
        assert self._plan is not None, "the session has ended"
        return map(self._plan.chunk, chunks_of(self._manifest, rows))

    def _place(self, chunk: Chunk, which: int) -> torch.Tensor:
        if chunk.home is not None:
            return chunk.home
        return self._memory.incoming(which, chunk.manifest.arena_bytes)

    def _arriving(
        self, chunks: Iterable[Chunk], end: float
    ) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Each chunk when it is whole; those after it are under way by then, as far as there is memory for them."""
        under_way: deque[tuple[Chunk, torch.Tensor, Future[None]]] = deque()
        num_incoming = 0  # how many of them are on their way into a receive buffer
        which = 0

        def arrived() -> tuple[Chunk, torch.Tensor]:
            nonlocal num_incoming
            chunk, incoming, whole = under_way.popleft()
            self._memory.wait(whole)
            num_incoming -= chunk.home is None
            return chunk, incoming

        for chunk in chunks:
            while chunk.home is None and num_incoming == 2:
                yield arrived()
            incoming = self._place(chunk, which)
            if chunk.home is None:
                num_incoming, which = num_incoming + 1, 1 - which
            whole = self._group.receive_into(incoming, chunk.ranges, timeout_s=left_s(end))
            under_way.append((chunk, incoming, whole))
        while under_way:
            yield arrived()
