"""Full KV blocks by content: which block holds these tokens, after that prefix, under this weight version.

A block's key is (identity of the prefix before it, weight version, its tokens). Keys are compared as a whole, so two
different prefixes never meet, and a block whose prefix was evicted or is of another version is never found.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

ROOT_UID = 0
"""Identity of the empty prefix."""

Key = tuple[int, int, tuple[int, ...]]


def root_of(salt: str, rows: str = "") -> int:
    """Identity of the empty prefix of requests with this salt, and of prompts that are these rows of numbers: the same
    on every rank, and never that of a block, nor -1. Without either it is `ROOT_UID`.

    No salt, which callers choose, has the root of any rows.
    """
    if not salt and not rows:
        return ROOT_UID
    text = f"{len(rows)} {rows}{salt}".encode("utf-8", "surrogatepass")
    return -2 - int.from_bytes(hashlib.sha256(text).digest()[:16])


class PrefixCache:
    """Registered blocks, and among them the idle ones (held by nobody) in order of their last use."""

    def __init__(self, num_blocks: int) -> None:
        self._blocks: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * num_blocks
        self._uids = [ROOT_UID] * num_blocks
        self._next_uid = ROOT_UID + 1
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Registered blocks that nobody holds."""
        return len(self._idle)

    def find(self, parent_uid: int, version: int, tokens: tuple[int, ...]) -> int | None:
        """The block registered under this key."""
        return self._blocks.get((parent_uid, version, tokens))

    def uid(self, block: int) -> int:
        """Identity of the prefix that ends with this registered block."""
        return self._uids[block]

    def insert(self, block: int, parent_uid: int, version: int, tokens: tuple[int, ...]) -> int:
        """Register a block; the identity of the prefix that ends with it.

        If another block is registered under the key, that one stays and its identity is returned: blocks after either
        are found through it.
        """
        key = (parent_uid, version, tokens)
        known = self._blocks.get(key)
        if known is not None:
            return self._uids[known]
        uid = self._next_uid
        self._next_uid = uid + 1
        self._blocks[key] = block
        self._keys[block] = key
        self._uids[block] = uid
        return uid

    def is_registered(self, block: int) -> bool:
        """Whether this very block can be found."""
        return self._keys[block] is not None

    def is_idle(self, block: int) -> bool:
        """Whether nobody holds this registered block."""
        return block in self._idle

    def set_idle(self, block: int) -> None:
        """Nobody holds this registered block any more; it is now the most recently used."""
        self._idle[block] = None

    def set_held(self, block: int) -> None:
        """Somebody holds this idle block again."""
        del self._idle[block]

    def evict(self) -> int:
        """Forget the idle block that was used longest ago; it is the caller's."""
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        return block

    def clear(self) -> list[int]:
        """Forget everything; the blocks that were idle are the caller's."""
        idle = list(self._idle)
        self._idle.clear()
        self._blocks.clear()
        self._keys = [None] * len(self._keys)
        return idle

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._blocks[key]
        self._keys[block] = None

    def idle_blocks(self) -> Iterable[int]:
        """Idle blocks, least recently used first."""
        return iter(self._idle)

    def keys(self) -> dict[int, Key]:
        """Registered blocks with their keys (a copy, for checks)."""
        return {block: key for block, key in enumerate(self._keys) if key is not None}

    def check_invariants(self) -> None:
        """Both directions of the map agree, and idle blocks are registered."""
        keys = self.keys()
        assert {key: block for block, key in keys.items()} == self._blocks, "the map is torn"
        stray = [block for block in self._idle if block not in keys]
        assert not stray, f"idle blocks that nobody can find: {stray}"
        uids = [self._uids[block] for block in keys]
        assert len(set(uids)) == len(uids) and ROOT_UID not in uids, "prefix identities repeat"
