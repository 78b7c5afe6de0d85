"""What the weight receiver may do to a running engine (`weight_sync.receiver.host.WeightHost`), on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch

from weight_sync.errors import TornWeightsError
from weight_sync.wire.messages import CommitReply

from ...config import KvPolicy
from ...distributed.group_coordinator import GroupCoordinator
from ...errors import NoUpdateYetError
from ...protocol.commands import SyncSeen
from ...runner.model_runner import ModelRunner
from ...scheduling.scheduler import Scheduler
from .memory import MemoryOccupation
from .postprocess import Postprocessor

T = TypeVar("T")


class Loop(Protocol):
    """The engine loop, as far as the host needs it."""

    def between_steps(
        self, action: Callable[[], T], timeout_s: float, name: str | None = None
    ) -> T:
        """Run `action` at a step boundary and wait for it."""
        ...

    def forgo(self, name: str) -> None:
        """An action of that name that has not begun never will."""
        ...

    def soon(self, action: Callable[[], None], name: str) -> None:
        """Run `action` at a step boundary (now, on the loop's thread) without waiting for it."""
        ...


class EngineWeightHost:
    """Refreshes what depends on the weights when they change; refuses to generate while they are a mixture."""

    def __init__(
        self,
        loop: Loop,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        post: Postprocessor,
        memory: MemoryOccupation,
        kv_policy: KvPolicy,
        awaits_update: bool = False,
    ) -> None:
        self.named: Callable[[str], AbstractContextManager[Any]] = nullcontext
        """The context of a phase of an update; a profiler's range while there is one."""
        self._loop = loop
        self._runner = runner
        self._scheduler = scheduler
        self._post = post
        self._memory = memory
        self._kv_policy = kv_policy
        self.torn: str | None = NoUpdateYetError.STATE if awaits_update else None
        """Why nothing may be generated, or None."""
        self._num_holds = 0  # The same on all ranks: a name for what follows from each.

    def between_steps(
        self, action: Callable[[], T], timeout_s: float, name: str | None = None
    ) -> T:
        """Run `action` at a step boundary; ranks that pass the same name do so at the same one."""
        return self._loop.between_steps(action, timeout_s, name)

    def forgo(self, name: str) -> None:
        """The action of that name is not wanted any more."""
        self._loop.forgo(name)

    def unwritable(self) -> str | None:
        """Why parameters cannot be written at present, or None."""
        return self._memory.weights_gone

    def reading(self) -> AbstractContextManager[Any]:
        """While it is held, the memory of the parameters is not given back."""
        return self._memory.reading

    def lend_kv_cache(self) -> None:
        """The KV cache's released memory is an update's until `return_kv_cache`."""
        self._memory.lend_kv_cache()

    def return_kv_cache(self) -> None:
        """The KV cache may be resumed again."""
        self._memory.return_kv_cache()

    def weights_written(self, version: int, label: str | None, kv_policy: str | None) -> None:
        """New bytes are resident: refresh what is derived from them, move the version, treat the KV."""
        self.torn = None
        self._runner.refresh_derived_state()
        self._post.version = label if label is not None else str(version)
        self._post.number = version
        if (kv_policy or self._kv_policy) in ("recompute", "flush"):
            self._scheduler.recompute_all()
        # Prefixes of older versions are never found again, whatever the policy.
        self._scheduler.kv.set_weight_version(version)

    def label_changed(self, label: str) -> None:
        """The weights have another name, and tokens from now on a span of their own."""
        self._post.version = label

    def hold_outputs(self) -> None:
        """Keep tokens back until `release_outputs` (overlapped verification)."""
        self._num_holds += 1
        self._post.hold()

    def release_outputs(self, ok: bool) -> None:
        """Hand out the tokens that were held, or undo them where the new version turned out wrong."""
        self._loop.soon(lambda: self._post.release(ok), f"release/{self._num_holds}")

    def weights_torn(self, reason: str, version: int, label: str) -> None:
        """The weights are a mixture: end every request, refuse new ones until a complete update has committed."""

        def end_all() -> None:
            self.torn = reason
            self._post.version, self._post.number = label, version
            self._post.release(False)
            # Who waits for a later version waits for the one that repairs them.
            self._post.abort_all(
                f"the weights cannot be used: {reason}; push a complete update", held=False
            )

        self._loop.soon(end_all, f"torn/{self._num_holds}")

    def check_whole(self) -> None:
        """`TornWeightsError` while nothing may be generated."""
        awaited = NoUpdateYetError.found(self.torn)
        if awaited is not None:
            raise awaited
        if self.torn is not None:
            raise TornWeightsError(
                f"cannot generate: the weights are not whole ({self.torn}); push a complete update first"
            )


def syncs_seen(recent: Iterable[tuple[float, CommitReply]]) -> list[SyncSeen]:
    """The receiver's last commits, as a status tells them."""
    now = time.perf_counter()
    return [
        SyncSeen(
            version=reply.version,
            label=reply.label,
            ago_s=now - at,
            num_updated=reply.num_updated,
            stage_s=reply.stage_s,
            copy_s=reply.copy_s,
            verify_s=reply.verify_s,
            pause_s=reply.pause_s,
            total_s=reply.begin_to_verified_s,
        )
        for at, reply in recent
    ]


def read_weight(
    runner: ModelRunner,
    name: str,
    group: GroupCoordinator,
    on_all: Callable[[Callable[[], Any]], Any],
) -> torch.Tensor:
    """A whole parameter in the trainer's shape; all ranks of `group` read it together.

    `on_all(step)` is what `step` returns; where it fails on one rank, it has failed on all.
    """
    located = runner.weight_map.locate(name)
    if group.size == 1:
        return located.read()
    mine = on_all(lambda: (located.read().cpu(), located.mask().to(torch.uint8)))
    # Parts may be on several ranks (replicated heads): take each element from the last rank that holds it.
    parts, held = (group.all_gather(part[None], dim=0) for part in mine)
    result = torch.zeros_like(parts[0])
    for part, mask in zip(parts, held, strict=True):
        result = torch.where(mask.bool(), part, result)
    return result
