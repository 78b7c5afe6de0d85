"""Bookkeeping of the paged KV cache: which block holds what, who owns it, which weight version computed it."""
