"""Which block of the KV pool belongs to which sequence, which content can be reused, and who computed it.

Pure bookkeeping: block numbers and token ids, no tensors. It is a function of the sequence of calls, so every
tensor-parallel rank that makes the same calls gets the same blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .block_allocator import BlockAllocator
from .prefix_cache import Key, PrefixCache
from .sequence import CachedSequence

BROKEN_CHAIN = -1
"""`chain_uid` of a sequence whose KV was computed by more than one version: its blocks are not registered any more."""


class KVCacheManager:
    """Owns the pool of `num_blocks` blocks of `block_size` tokens; block ids 0 to `num_blocks - 1` are all used."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        enable_prefix_cache: bool = True,
        version: int = 0,
    ) -> None:
        if block_size < 1:
            raise ValueError(
                f"block_size: got {block_size}, expected at least 1; the usual value is 16"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self.version = version
        """Weight version that computes new KV; changed by `set_weight_version` only."""
        self.epoch = 0
        """Grows with every change of weights and every flush; KV of an older epoch is not shared."""
        self.num_releases = 0
        """Grows whenever a sequence gives its blocks back."""
        self._allocator = BlockAllocator(num_blocks)
        self._prefixes = PrefixCache(num_blocks)
        self._first_version = [version] * num_blocks
        self._last_version = [version] * num_blocks
        self._copies: dict[int, int] = {}  # destination -> source

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free ones, and idle ones by evicting what they hold."""
        return self._allocator.num_free + self._prefixes.num_idle

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold, each counted once."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that this many positions take."""
        return -(-num_positions // self.block_size)

    def versions_of(self, block: int) -> tuple[int, int]:
        """First and last weight version that wrote the content of a held or idle block; equal unless it is mixed."""
        return self._first_version[block], self._last_version[block]

    # Weights ----------------------------------------------------------------------------------------------------------

    def set_weight_version(self, version: int) -> None:
        """From now on KV is computed by other weights, which are called `version`. Called between two steps.

        Nothing computed before is found again, also if `version` was there before: after a roll-back and another
        attempt the same number means other weights. Sequences keep their blocks; what they compute from here on is
        not shared. To drop their blocks too, let the scheduler `recompute_all`.
        """
        self.version = version
        self.flush()

    def flush(self) -> None:
        """Forget all reusable content; blocks that sequences hold stay theirs. Called between two steps."""
        self.epoch += 1
        for block in reversed(self._prefixes.clear()):
            self._allocator.free(block)

    # Blocks of a sequence ---------------------------------------------------------------------------------------------

    def match(self, sequence: CachedSequence, limit: int) -> list[int]:
        """Blocks that hold the longest known prefix of `sequence` within its first `limit` positions.

        Nothing is taken: give the result to `cost` and `admit` before any other call.
        """
        hits: list[int] = []
        if not self.enable_prefix_cache:
            return hits
        size, tokens, uid = self.block_size, sequence.token_ids, sequence.root_uid
        for end in range(size, limit + 1, size):
            block = self._prefixes.find(uid, self.version, tuple(tokens[end - size : end]))
            if block is None:
                break
            hits.append(block)
            uid = self._prefixes.uid(block)
        return hits

    def missing_block(
        self, sequence: CachedSequence, hits: Sequence[int], limit: int
    ) -> Key | None:
        """Under which key the block after `hits`, the result of `match`, would have been found; None: it has no end
        within the limit."""
        end = (len(hits) + 1) * self.block_size
        if not self.enable_prefix_cache or end > limit:
            return None
        uid = self._prefixes.uid(hits[-1]) if hits else sequence.root_uid
        return uid, self.version, tuple(sequence.token_ids[end - self.block_size : end])

    def growing_block(self, sequence: CachedSequence) -> Key | None:
        """Under which key the next block of a sequence will be found once its known tokens are computed; None: it is
        not full then, or will not be shared."""
        end = (sequence.num_computed // self.block_size + 1) * self.block_size
        if not self.enable_prefix_cache or end > len(sequence.token_ids):
            return None
        if not self.can_fork(sequence):
            return None
        tokens = tuple(sequence.token_ids[end - self.block_size : end])
        return sequence.chain_uid, self.version, tokens

    def cost(self, hits: Sequence[int], num_positions: int) -> int:
        """By how much `num_available` would shrink if a sequence took `hits` and had room for `num_positions`."""
        num_idle = sum(map(self._prefixes.is_idle, hits))
        return self.blocks_for(num_positions) - len(hits) + num_idle

    def admit(self, sequence: CachedSequence, hits: Sequence[int], num_positions: int) -> None:
        """Give an empty sequence the blocks of its prefix and room for `num_positions`; they must be available."""
        assert not sequence.block_ids, "only an empty sequence is admitted"
        for block in hits:
            if self._allocator.ref_counts[block] == 0:
                self._prefixes.set_held(block)
            self._allocator.share(block)
        sequence.block_ids = list(hits)
        sequence.num_computed = len(hits) * self.block_size
        sequence.chain_uid = self._prefixes.uid(hits[-1]) if hits else sequence.root_uid
        sequence.kv_epoch = self.epoch
        for _ in range(self.blocks_for(num_positions) - len(hits)):
            sequence.block_ids.append(self._take())
        sequence.capacity = len(sequence.block_ids) * self.block_size

    def extend(self, sequence: CachedSequence) -> None:
        """One more block for a sequence whose next position has none; the caller has made sure that there is one."""
        sequence.block_ids.append(self._take())
        sequence.capacity += self.block_size

    def commit(self, sequence: CachedSequence, start: int, end: int) -> None:
        """Positions `start` to `end - 1` now hold KV: record who computed it, register the blocks that became full.

        May be left out for one position that is neither the first nor the last of its block if the sequence's
        `kv_epoch` is the current one.
        """
        size, version = self.block_size, self.version
        if sequence.kv_epoch != self.epoch:
            sequence.kv_epoch = self.epoch
            sequence.chain_uid = BROKEN_CHAIN if start > 0 else sequence.root_uid
        blocks = sequence.block_ids
        for index in range(start // size, -(-end // size)):
            block = blocks[index]
            self._last_version[block] = version
            if index * size >= start:
                self._first_version[block] = version
        uid = sequence.chain_uid
        if not self.enable_prefix_cache or uid == BROKEN_CHAIN:
            return
        for index in range(start // size, end // size):
            tokens = tuple(sequence.token_ids[index * size : index * size + size])
            uid = self._prefixes.insert(blocks[index], uid, version, tokens)
        sequence.chain_uid = uid

    def can_fork(self, parent: CachedSequence) -> bool:
        """All of the parent's KV is of the current weights, so another sequence may share it."""
        return parent.kv_epoch == self.epoch and parent.chain_uid != BROKEN_CHAIN

    def fork(self, parent: CachedSequence, child: CachedSequence) -> None:
        """Give the empty `child` all that `parent` has computed: full blocks are shared, a partial one is copied.

        Needs one available block if the last block is partial. The copy is in the next `take_copies`.
        """
        assert not child.block_ids and self.can_fork(parent)
        num_full, rest = divmod(parent.num_computed, self.block_size)
        child.block_ids = parent.block_ids[:num_full]
        for block in child.block_ids:
            self._allocator.share(block)
        if rest:
            source = parent.block_ids[num_full]
            destination = self._take()
            self._copies[destination] = source
            self._first_version[destination] = self._first_version[source]
            self._last_version[destination] = self._last_version[source]
            child.block_ids.append(destination)
        child.capacity = len(child.block_ids) * self.block_size
        child.num_computed = parent.num_computed
        child.chain_uid = parent.chain_uid
        child.kv_epoch = parent.kv_epoch

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, destination) of copies to make before anything else is computed.

        A source may have been given to another sequence since; its content stays until the next forward.
        """
        if not self._copies:
            return []
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        return copies

    def source_of(self, block: int) -> int:
        """Where the content of a block is now: in another one, if it is a copy that is still to be made."""
        return self._copies.get(block, block)

    def release(self, sequence: CachedSequence) -> None:
        """Take all blocks of a sequence back; registered ones stay findable until they are needed."""
        # Last block first: the end of a prefix is evicted before its beginning, without which it is never found.
        for block in reversed(sequence.block_ids):
            if self._allocator.release(block):
                self._copies.pop(block, None)
                if self._prefixes.is_registered(block):
                    self._prefixes.set_idle(block)
                else:
                    self._allocator.free(block)
        sequence.block_ids = []
        sequence.capacity = 0
        sequence.num_computed = 0
        sequence.chain_uid = sequence.root_uid
        sequence.kv_epoch = -1
        self.num_releases += 1

    def _take(self) -> int:
        if not self._allocator.num_free:
            self._allocator.free(self._prefixes.evict())
        return self._allocator.allocate()

    # Checks -----------------------------------------------------------------------------------------------------------

    def check_invariants(self, sequences: Iterable[CachedSequence]) -> None:
        """`sequences` are all that hold blocks. Every block is free, idle or held; counts and versions agree."""
        held: Counter[int] = Counter()
        for sequence in sequences:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids), "a block twice in one"
            assert sequence.capacity == len(sequence.block_ids) * self.block_size
            assert sequence.num_computed <= sequence.capacity
            held.update(sequence.block_ids)
        counts = {block: n for block, n in enumerate(self._allocator.ref_counts) if n}
        assert counts == dict(held), f"reference counts {counts}, but sequences hold {dict(held)}"
        self._prefixes.check_invariants()
        self._allocator.check_invariants(set(self._prefixes.idle_blocks()))
        for block, (_, version, tokens) in self._prefixes.keys().items():
            assert len(tokens) == self.block_size
            assert self.versions_of(block) == (version, version), f"block {block} is mixed"
        for block, count in held.items():
            first, last = self.versions_of(block)
            assert count == 1 or first == last, f"mixed block {block} is shared by {count}"
        for destination, source in self._copies.items():
            assert held[destination] == 1 and destination != source
            assert source not in self._copies, "a copy of a copy"
