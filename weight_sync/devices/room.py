"""Whether a GPU can spare memory for an update."""

from __future__ import annotations

import torch

SPARED_BYTES = 2 << 30
"""What is left to others when something is taken that can also be done without."""


def can_spare(device: torch.device, num_bytes: int) -> bool:
    """Whether `device` has so much free and something left then; always where it is no GPU."""
    if device.type != "cuda":
        return True
    return torch.cuda.mem_get_info(device)[0] - num_bytes >= SPARED_BYTES
