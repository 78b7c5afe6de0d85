"""Whether two runs drew the same samples, but for draws that rounding decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollout.layers.draw import uniforms
from rollout.sampling_params import SamplingParams

ROUNDING = 2e-6
"""Sums of other batches, in another order, move the borders between tokens by less."""


def check_same_samples(
    got: Sequence[Any],
    expected: Sequence[Any],
    *,
    model: Any,
    prompts: Sequence[list[int]],
    sampling_params: Sequence[dict[str, Any]],
) -> None:
    """Results of the same prompts (their seeds are in `sampling_params`) have the same tokens.

    Where two differ, their requests shared steps with others, and one draw in a million falls on the other side of a
    border that moved by its rounding. So the first tokens that differ must be neighbours, by `model` (transformers,
    float32), and the number that drew them must be on the border between them.
    """
    asked = [
        (prompt, SamplingParams(**params), index)
        for prompt, params in zip(prompts, sampling_params, strict=True)
        for index in range(params.get("n", 1))
    ]
    for (prompt, params, index), one, other in zip(asked, got, expected, strict=True):
        pairs = zip(one["output_ids"], other["output_ids"], strict=True)
        differs = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        if differs is None:
            continue
        low, high = sorted(result["output_ids"][differs] for result in (one, other))
        borders = _borders(model, prompt + one["output_ids"][:differs], params.temperature)
        drawn = _drawn(params, index, differs)
        assert max(abs(borders[low] - drawn), abs(borders[high - 1] - drawn)) < ROUNDING


def _borders(model: Any, ids: list[int], temperature: float) -> list[float]:
    """For each token, the probability of it and of all before it, behind `ids`."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    return (logits / temperature).softmax(-1).cumsum(-1).tolist()


def _drawn(params: SamplingParams, index: int, position: int) -> float:
    """The number that drew token `position` of sample `index`."""
    seed = params.seed_for_sample(index, 0, 0)
    return float(uniforms(np.array([seed], np.uint64), np.array([position]))[0])
