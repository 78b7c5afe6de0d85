"""Which of an engine's memory is given back at present, and what that means for requests and weights."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence

import torch

from weight_sync.errors import WeightUpdateError
from weight_sync.process_groups.rendezvous import first_line

from ...errors import RolloutError
from ...protocol.commands import MEMORY_TAGS, MemoryTag
from ...runner.memory_regions import HostCopy, MemoryRegion, region_of
from ...runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

_RELEASED = "their memory is released; call resume_memory_occupation(['weights']) first"


def give_back(runner: ModelRunner) -> None:
    """`ModelRunner.free`, of a GPU that may have failed, and then gives nothing back before its process ends."""
    try:
        runner.free()
    except Exception as error:
        logger.warning("cannot give back an engine's memory: %s", first_line(error))


class MemoryOccupation:
    """Releases and resumes by tag; releasing twice, or resuming what is there, changes nothing."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._regions: dict[MemoryTag, MemoryRegion] = {}
        self._host_copy: HostCopy | None = None
        self._weights_kept = False
        self._lent = False
        self.released: set[MemoryTag] = set()
        """Tags whose memory is gone."""
        self.reading = threading.RLock()
        """Whoever reads parameters on another thread than the loop's holds it: nothing is released meanwhile."""
        self._leaving: str | None = None

    @property
    def weights_gone(self) -> str | None:
        """Why no update may touch the weights: released, or about to be, or to be reset; any thread may ask."""
        return _RELEASED if "weights" in self.released else self._leaving

    @contextlib.contextmanager
    def leaving(self, tags: Sequence[MemoryTag], why: str = _RELEASED) -> Iterator[None]:
        """Around the decision whether to release or reset `tags`: whoever asks sees them as gone from its beginning on.

        So an update that begins meanwhile is not voted for, whatever it would have made of the weights.
        """
        self._leaving = why if "weights" in tags else None
        try:
            yield
        finally:
            self._leaving = None

    def present(self, tags: Sequence[MemoryTag]) -> list[MemoryTag]:
        """Those of `tags` whose memory is there; `RolloutError` on a device that cannot give it back."""
        found = [tag for tag in MEMORY_TAGS if tag in tags and tag not in self.released]
        for tag in found:
            self._region(tag)
        return found

    def keep_weights(self, keep: bool) -> None:
        """Before they are released: whether `resume` brings them back as they are, out of a copy in the host's memory.

        `RolloutError` where there is no room for that; then nothing has changed.
        """
        with self.reading:
            if not keep:
                self._weights_kept, self._host_copy = False, None
                return
            try:
                if self._host_copy is None:
                    self._host_copy = HostCopy(self._runner.model.arena.buffers.values())
                self._host_copy.take()
            except RuntimeError as error:  # torch says it of the host's memory, too
                raise RolloutError(
                    f"cannot keep weights: got no copy of them in the host's memory ({first_line(error)}), expected "
                    "room for one; free some, or release them without keep_weights"
                ) from error
            self._weights_kept = True

    def release(self, tags: Sequence[MemoryTag]) -> int:
        """Give back the memory of `tags`, which is `present`; bytes on this rank.

        They count as released whatever is raised: what was in them is gone, or part of it.
        """
        with self.reading:
            self.released.update(tags)
            for tag in tags:
                self._region(tag).release()
        return sum(self._region(tag).num_bytes for tag in tags)

    def resume(self, tags: Sequence[MemoryTag]) -> tuple[list[MemoryTag], int]:
        """Take memory again; returns the tags that changed and their bytes on this rank.

        `RolloutError` where there is not enough of it; then nothing has changed.
        """
        changed = [tag for tag in MEMORY_TAGS if tag in tags and tag in self.released]
        with self.reading:
            if "kv_cache" in changed and self._lent:
                raise RolloutError(
                    "cannot resume kv_cache: an update waits in its memory (staging='kv_cache'); resume it when the "
                    "update has ended, or abort that"
                )
            return self._resume(changed)

    def lend_kv_cache(self) -> None:
        """Keep what the KV cache gave back free for an update; `WeightUpdateError` if it has not. Any thread."""
        with self.reading:
            if "kv_cache" not in self.released:
                raise WeightUpdateError(
                    "the update is to wait in the memory of the KV cache (staging='kv_cache'): got a KV cache that has "
                    "its memory, expected one that is released; call release_memory_occupation(['kv_cache']) first, or "
                    "use staging='extra'"
                )
            self._lent = True

    def return_kv_cache(self) -> None:
        """The update is over; any thread."""
        with self.reading:
            self._lent = False

    def _resume(self, changed: list[MemoryTag]) -> tuple[list[MemoryTag], int]:
        taken: list[MemoryTag] = []
        try:
            for tag in changed:
                self._region(tag).resume()
                taken.append(tag)
            if "weights" in changed and self._weights_kept:
                assert self._host_copy is not None, "it was made before the release"
                self._host_copy.restore()
        except Exception:
            for tag in taken:
                self._region(tag).release()
            raise
        self.released.difference_update(changed)
        return changed, sum(self._region(tag).num_bytes for tag in changed)

    def undo_resume(self, tags: Sequence[MemoryTag]) -> None:
        """Release what was resumed just now, as it was before."""
        self.released.update(tags)
        for tag in tags:
            self._region(tag).release()

    def end(self, *, alone: bool) -> None:
        """The loop has ended: let go of graphs and, if nobody else works with the memory, of all of it, because this
        process may go on without the engine. Whoever still asks on another thread finds it released."""
        self._runner.forget_graphs()
        if alone:
            with self.reading:
                self.released.update(MEMORY_TAGS)
                give_back(self._runner)

    def _region(self, tag: MemoryTag) -> MemoryRegion:
        if tag not in self._regions:
            pool, arena = self._runner.kv_pool, self._runner.model.arena
            if tag == "cuda_graph":
                self._regions[tag] = _Graphs(self._runner)
            elif tag == "kv_cache":
                self._regions[tag] = region_of([pool.memory], [pool.mapped])
            else:
                self._regions[tag] = region_of(arena.buffers.values(), arena.mapped)
        return self._regions[tag]


class _Graphs:
    """The memory of captured decode steps. Whoever resumes it captures them anew, when all that they read is there."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.num_bytes = 0
        """What the last release gave back."""

    def release(self) -> None:
        """Let go of the graphs, and of what torch keeps cached."""
        device, self.num_bytes = self._runner.device, 0
        if device.type != "cuda":
            self._runner.forget_graphs()
            return
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_reserved(device)
        self._runner.forget_graphs()
        torch.cuda.empty_cache()
        self.num_bytes = before - torch.cuda.memory_reserved(device)

    def resume(self) -> None:
        """Nothing to do here."""
