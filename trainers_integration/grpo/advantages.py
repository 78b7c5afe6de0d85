"""Group-normalised advantages: a completion is compared with the other samples of its own prompt."""

from __future__ import annotations

import torch

#: Below this spread all samples of a group are equally good, and there is nothing to learn from it.
MIN_STD = 1e-6


def group_advantages(rewards: torch.Tensor, *, normalize_std: bool = True) -> torch.Tensor:
    """Advantages, shape (prompts, samples), from rewards of that shape.

    Every group is centred on its own mean and, with `normalize_std`, divided by its own (population) standard
    deviation. A group whose samples all got the same reward has the advantage zero.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"cannot compare samples: got rewards of shape {tuple(rewards.shape)}, expected (prompts, samples) with "
            "at least 2 samples; raise samples_per_prompt"
        )
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not normalize_std:
        return centred
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(std > MIN_STD, centred / std.clamp_min(MIN_STD), torch.zeros_like(centred))
