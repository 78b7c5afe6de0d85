"""Which of an engine's memory is given back at present, and what that means for requests and weights."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import RolloutError
from ...protocol.commands import MEMORY_TAGS, MemoryTag
from ...runner.memory_regions import MemoryRegion, region_of
from ...runner.model_runner import ModelRunner


class MemoryOccupation:
    """Releases and resumes by tag; releasing twice, or resuming what is there, changes nothing."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._regions: dict[MemoryTag, MemoryRegion] = {}
        self.released: set[MemoryTag] = set()
        """Tags whose memory is gone."""

    def release(self, tags: Sequence[MemoryTag]) -> tuple[list[MemoryTag], int]:
        """Give memory back; returns the tags that changed and their bytes on this rank."""
        changed = [tag for tag in MEMORY_TAGS if tag in tags and tag not in self.released]
        for tag in changed:
            self._region(tag).release()
            self.released.add(tag)
        return changed, sum(self._region(tag).num_bytes for tag in changed)

    def resume(self, tags: Sequence[MemoryTag]) -> tuple[list[MemoryTag], int]:
        """Take memory again; returns the tags that changed and their bytes on this rank.

        `RolloutError` where there is not enough of it; then nothing has changed.
        """
        changed = [tag for tag in MEMORY_TAGS if tag in tags and tag in self.released]
        taken: list[MemoryTag] = []
        try:
            for tag in changed:
                self._region(tag).resume()
                taken.append(tag)
        except RolloutError:
            for tag in taken:
                self._region(tag).release()
            raise
        self.released.difference_update(changed)
        return changed, sum(self._region(tag).num_bytes for tag in changed)

    def _region(self, tag: MemoryTag) -> MemoryRegion:
        if tag not in self._regions:
            memory = (
                [self._runner.kv_pool.memory]
                if tag == "kv_cache"
                else list(self._runner.model.arena.buffers.values())
            )
            self._regions[tag] = region_of(memory)
        return self._regions[tag]
