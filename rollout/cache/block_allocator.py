"""Reference counts of a fixed pool of KV blocks, and the list of free ones."""

from __future__ import annotations


class BlockAllocator:
    """Blocks 0 to `num_blocks - 1`, each free, held (count > 0), or idle (count 0 but kept for its content).

    The order in which blocks are given out depends on the order of calls alone.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(
                f"KV pool: got {num_blocks} blocks, expected at least 1; give the KV cache more memory"
            )
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing worth keeping."""
        return len(self._free)

    def allocate(self) -> int:
        """A free block, held once. The caller has made sure that there is one."""
        block = self._free.pop()
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Hold a held or idle block once more."""
        self.ref_counts[block] += 1

    def release(self, block: int) -> bool:
        """Hold it once less. True: nobody holds it now, it is idle; `free` it or keep its content."""
        count = self.ref_counts[block] - 1
        assert count >= 0, f"block {block} was released once too often"
        self.ref_counts[block] = count
        return count == 0

    def free(self, block: int) -> None:
        """Make an idle block free."""
        self._free.append(block)

    def check_invariants(self, idle: set[int]) -> None:
        """Every block is free, idle or held, and only one of these; `idle` is what the caller keeps."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert not free & idle, f"blocks both free and idle: {sorted(free & idle)}"
        for block, count in enumerate(self.ref_counts):
            unheld = block in free or block in idle
            assert (count == 0) == unheld, f"block {block}: count {count}, free or idle: {unheld}"
