"""The part of a request that the KV cache reads and writes."""

from __future__ import annotations

from collections.abc import Sequence


class CachedSequence:
    """Token ids and the blocks that hold their keys and values.

    Position `p` lives in slot `p % block_size` of block `block_ids[p // block_size]`. Positions below
    `num_computed` hold KV; only the `KVCacheManager` changes `block_ids`, which grows at its end and is emptied, but
    never rearranged.
    """

    __slots__ = (
        "block_ids",
        "capacity",
        "chain_uid",
        "kv_epoch",
        "num_computed",
        "root_uid",
        "token_ids",
    )

    def __init__(self, token_ids: Sequence[int], root_uid: int = 0) -> None:
        self.root_uid = root_uid
        """Identity of the empty prefix that it begins from; sequences of different ones share no prefix."""
        self.token_ids: list[int] = list(token_ids)
        """Prompt and output."""
        self.block_ids: list[int] = []
        """Blocks in order of position."""
        self.capacity = 0
        """Positions that `block_ids` has room for."""
        self.num_computed = 0
        """Tokens whose KV is in the cache."""
        self.chain_uid = root_uid
        """Identity of the prefix that this sequence's full blocks form in the prefix cache."""
        self.kv_epoch = -1
        """Epoch of the weights that computed all of its KV; -1: nothing computed, or by more than one epoch."""
