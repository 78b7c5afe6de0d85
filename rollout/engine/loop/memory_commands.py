"""Commands about an engine's memory and what is in it; all ranks carry them out at one place in their order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.wire.rpc import Call

from ...distributed.group_coordinator import GroupCoordinator
from ...errors import RolloutError
from ...protocol import commands as cmd
from ...runner.model_runner import ModelRunner
from ...scheduling.scheduler import Scheduler
from .memory import MemoryOccupation
from .weight_host import read_weight

T = TypeVar("T")
logger = logging.getLogger(__name__)


class MemoryCommands:
    """Handlers for the engine loop, on its thread."""

    def __init__(
        self,
        memory: MemoryOccupation,
        runner: ModelRunner,
        scheduler: Scheduler,
        receiver: WeightReceiver,
        order: GroupCoordinator,
        moved: Callable[[], None],
    ) -> None:
        """`order`: the group of the ranks' order. `moved()` is told when requests may go on."""
        self._memory = memory
        self._runner = runner
        self._scheduler = scheduler
        self._receiver = receiver
        self._order = order
        self._moved = moved

    def handlers(self) -> dict[type, Callable[[Call], None]]:
        """By command."""
        return {
            cmd.GetWeights: self._get_weights,
            cmd.SaveShardedModel: self._save,
            cmd.ResetWeights: self._reset,
            cmd.ReleaseMemory: self._release,
            cmd.ResumeMemory: self._resume,
        }

    def _get_weights(self, call: Call) -> None:
        if "weights" in self._memory.released:
            raise RolloutError(
                "cannot read weights: their memory is released; call resume_memory_occupation(['weights']) first"
            )
        tensor = read_weight(
            self._runner, call.body.name, self._order, partial(self._on_all, "read weights")
        )
        first, size = call.body.first_row, call.body.truncate_size
        rows = tensor[first : first + size] if tensor.dim() else tensor
        rows = rows.float().cpu().contiguous()
        call.reply(cmd.WeightValues(shape=list(rows.shape), data=rows.numpy().tobytes()))

    def _save(self, call: Call) -> None:
        if (torn := self._receiver.torn) is not None or "weights" in self._memory.released:
            raise RolloutError(
                f"cannot save weights: they are not whole ({torn or 'their memory is released'}); push a complete "
                "update first"
            )
        asked = call.body
        saved = self._on_all(
            f"save into {asked.path}",
            lambda: self._runner.save_sharded_model(asked.path, asked.pattern, asked.max_size),
        )
        call.reply(cmd.Done(count=int(self._order.all_reduce(torch.tensor([len(saved)])))))

    def _reset(self, call: Call) -> None:
        parameters = self._runner.weight_map.parameters.values()
        with self._memory.leaving(("weights",), "they are being reset; push again"):
            if "weights" in self._memory.released or self._any_rank(self._receiver.updating):
                raise RolloutError(
                    "cannot reset weights: their memory is released, or an update is under way; resume it, or end the "
                    "update first"
                )
            try:
                with self._memory.reading, torch.no_grad():
                    generator = torch.Generator(self._runner.device).manual_seed(0)
                    for parameter in parameters:
                        parameter.normal_(generator=generator)
            finally:
                self._receiver.lose_weights("they were reset to noise")
        call.reply(cmd.Done(count=len(parameters)))

    def _release(self, call: Call) -> None:
        tags, keep = call.body.tags, call.body.keep_weights
        with self._memory.leaving(tags):
            if self._any_rank("weights" in tags and self._receiver.updating):
                raise RolloutError(
                    "cannot release weights: an update is under way; end or abort it first"
                )
            changed = self._memory.present(tags)
            if "weights" in changed:
                self._on_all("keep weights", lambda: self._memory.keep_weights(keep))
            if "kv_cache" in tags:
                self._scheduler.retract_all()
                self._scheduler.kv.flush()
            try:
                num_bytes = self._on_all("release memory", lambda: self._memory.release(changed))
            finally:
                if "weights" in changed and not keep:
                    self._receiver.lose_weights("their memory was released")
        self._memory_changed(call, changed, num_bytes)

    def _resume(self, call: Call) -> None:
        changed: list[cmd.MemoryTag] = []

        def resume() -> int:
            nonlocal changed
            changed, num_bytes = self._memory.resume(call.body.tags)
            return num_bytes

        try:
            num_bytes = self._on_all("resume memory", resume)
        except Exception:
            self._memory.undo_resume(changed)  # On all ranks or on none.
            raise
        self._recapture()
        self._moved()
        self._memory_changed(call, changed, num_bytes)

    def _recapture(self) -> None:
        """Decode steps over what is where it was, or elsewhere, once it is all there.

        Several ranks leave it to the next step: one that fails alone leaves the others in the middle of a sum, and only
        the failure of a step ends all of them.
        """
        graphs = self._runner.graphs
        if graphs is None:
            return
        if self._any_rank(graphs.moved):
            graphs.forget()
        if graphs.captured or self._memory.released or self._order.size > 1:
            return
        try:
            graphs.capture()
        except torch.OutOfMemoryError as error:
            graphs.forget()
            raise RolloutError(
                f"memory was resumed, and no room is left to capture decode steps: {error}; have the trainer give "
                "memory back (torch.cuda.empty_cache()): the next step tries again"
            ) from error

    def _on_all(self, what: str, step: Callable[[], T]) -> T:
        """Do `step` on all ranks; where it fails on one it has failed on all, and none of them waits for it."""
        failure: Exception | None = None
        try:
            done = step()
        except Exception as error:
            logger.warning("cannot %s: %s", what, error)
            failure = error
        if self._any_rank(failure is not None):
            raise failure or RolloutError(
                f"cannot {what}: another rank of the engine could not; look at its log"
            )
        return done

    def _any_rank(self, flag: bool) -> bool:
        """Whether it is so on any rank; all ranks ask at the same place in their order."""
        return bool(self._order.all_reduce(torch.tensor([int(flag)])).any())

    def _memory_changed(self, call: Call, changed: list[cmd.MemoryTag], num_bytes: int) -> None:
        total = self._order.all_reduce(torch.tensor([num_bytes]))
        call.reply(cmd.MemoryChanged(tags=changed, num_bytes=int(total)))
