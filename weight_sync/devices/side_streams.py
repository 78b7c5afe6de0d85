"""Streams beside the one on which generation runs, one for each purpose."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream | None:
    """This process's stream on `device` for `purpose`, the same at every call; None where `device` is no GPU.

    Torch's allocator keeps what it once took for the stream that it took it for, and torch hands out 32 streams in
    turn: a new one for each update would keep the temporary memory of an update 32 times.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None
