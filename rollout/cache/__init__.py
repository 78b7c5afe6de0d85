"""Bookkeeping of the paged KV cache: which block holds what, who owns it, which weight version computed it."""

from .block_allocator import BlockAllocator
from .kv_cache_manager import KVCacheManager
from .prefix_cache import PrefixCache
from .sequence import CachedSequence

__all__ = ["BlockAllocator", "CachedSequence", "KVCacheManager", "PrefixCache"]
