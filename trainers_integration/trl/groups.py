"""From a group of completions to TRL's samples: rewards, group-normalised advantages, and which policy drew them."""

from __future__ import annotations

import asyncio
import bisect
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.errors import RolloutError

RewardFunc = Callable[..., Any]

_NOT_FOR_REWARDS = frozenset(("prompt", "completion", "completion_ids"))
_TINY = 1e-8
"""Added to a group's standard deviation, as TRL adds it: a group of equal rewards teaches nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The completions of one prompt, whole."""

    row: Mapping[str, Any]
    """The row of the data set."""
    prompt_ids: list[int]
    """Its prompt as it was sent."""
    completion_ids: list[list[int]]
    """Sampled tokens, never empty."""
    logprobs: list[list[float]]
    """Of each sampled token, by the version that drew it."""
    completions: list[Any]
    """Text, or a list with the assistant's message where the prompt is a list of messages."""
    oldest_versions: list[int]
    """Number of the oldest weight version that drew a token of each completion."""
    num_mixed: int
    """Completions whose tokens were drawn by more than one version."""
    num_truncated: int
    """Completions that a length limit ended."""


class PolicyVersions:
    """TRL counts its updates and the engine its versions; here is which belongs to which.

    TRL tells its number only after the engine has begun to serve the version, so tokens may be of a version that has no
    number yet. The trainer's thread notes, the worker's asks.
    """

    def __init__(self) -> None:
        self._noted: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def note(self, policy: int, version: int) -> None:
        """The engine's `version` is TRL's `policy`."""
        versions, policies = self._noted
        keep = bisect.bisect_left(versions, version)
        self._noted = ((*versions[:keep], version), (*policies[:keep], policy))

    def policy_of(self, version: int) -> int | None:
        """TRL's number of an engine's version; None: TRL has not told it yet. What came before the first is 0."""
        versions, policies = self._noted
        if not versions or version > versions[-1]:
            return None
        at = bisect.bisect_right(versions, version) - 1
        return policies[at] if at >= 0 else 0


def reward_name(reward_func: RewardFunc) -> str:
    """As TRL names the columns of its logs."""
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return getattr(reward_func, "__name__", type(reward_func).__name__)


async def rewards_of(group: Group, reward_funcs: Sequence[RewardFunc]) -> np.ndarray:
    """Rewards, shape (functions, samples), NaN where a function gave None; functions that block run on a thread."""
    size = len(group.completions)
    columns = {
        key: [value] * size for key, value in group.row.items() if key not in _NOT_FOR_REWARDS
    }
    call = {
        "prompts": [group.row["prompt"]] * size,
        "completions": group.completions,
        "completion_ids": group.completion_ids,
        **columns,
    }
    found = []
    for reward_func in reward_funcs:
        if inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(
            getattr(reward_func, "__call__", None)  # noqa: B004
        ):
            values = await reward_func(**call)
        else:
            values = await asyncio.to_thread(reward_func, **call)
        if len(values) != size:
            raise RolloutError(
                f"reward function {reward_name(reward_func)!r}: got {len(values)} rewards, expected {size}, one for "
                "each completion"
            )
        found.append([np.nan if value is None else float(value) for value in values])
    return np.array(found, dtype=np.float64)


def advantages_of(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(advantages, summed rewards, their standard deviation) of a group, from rewards (functions, samples).

    Centred on the group's mean and divided by its standard deviation. A sample that no function could score has the
    reward NaN, takes no part in either, and has the advantage 0.
    """
    scored = ~np.isnan(rewards).all(axis=0)
    total = np.where(scored, np.nansum(rewards, axis=0), np.nan)
    advantages = np.zeros_like(total)
    if not scored.any():
        return advantages, total, float("nan")
    std = float(total[scored].std())
    advantages[scored] = (total[scored] - total[scored].mean()) / (std + _TINY)
    return advantages, total, std


def samples_of(
    group: Group, rewards: np.ndarray, names: Sequence[str], policies: Sequence[int], group_id: int
) -> list[Any]:
    """TRL's `RolloutSample`s: tokens of the prompt count for nothing and have the log-probability 0."""
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    advantages, total, std = advantages_of(rewards)
    num_prompt = len(group.prompt_ids)
    samples = []
    for i, ids in enumerate(group.completion_ids):
        metrics = {"reward": float(total[i]), "reward_std": std}
        metrics |= {f"rewards/{name}": float(rewards[k, i]) for k, name in enumerate(names)}
        samples.append(
            RolloutSample(
                prompt=group.row["prompt"],
                completion=group.completions[i],
                input_ids=np.array([*group.prompt_ids, *ids], dtype=np.int64),
                completion_mask=np.array([0] * num_prompt + [1] * len(ids), dtype=np.int64),
                old_log_probs=np.array([0.0] * num_prompt + group.logprobs[i], dtype=np.float32),
                advantage=float(advantages[i]),
                model_version=policies[i],
                group_id=group_id,
                metrics=metrics,
            )
        )
    return samples
