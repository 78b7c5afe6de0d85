"""From a group of completions to TRL's samples: rewards, group-normalised advantages, and which policy drew them."""

from __future__ import annotations

import asyncio
import bisect
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.errors import RolloutError

RewardFunc = Callable[..., Any]

_NOT_FOR_REWARDS = frozenset(("prompt", "completion", "completion_ids"))
_TINY = 1e-8
"""Added to a group's standard deviation, as TRL adds it: a group of equal rewards teaches nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is trained on as one sequence."""

    input_ids: list[int]
    """Prompt and output."""
    completion_mask: list[int]
    """1 for sampled tokens, 0 for those of prompts and tools."""
    old_log_probs: list[float]
    """Of each sampled token, by the version that drew it; 0 for the others."""

    @classmethod
    def of_one_turn(cls, prompt: list[int], output: list[int], logprobs: list[float]) -> Row:
        """A prompt and what followed it."""
        num = len(prompt)
        return cls([*prompt, *output], [0] * num + [1] * len(output), [0.0] * num + logprobs)


@dataclass(slots=True, kw_only=True)
class Rollout:
    """One completion, of one turn or several."""

    prompt: Any
    """Text or messages, an environment's observation included."""
    completion: Any
    """Text, or messages where the prompt is a list of messages: the assistant's, and those of tools."""
    completion_ids: list[int] = field(default_factory=list)
    """Sampled tokens of all turns."""
    rows: list[Row] = field(default_factory=list)
    """At least one."""
    oldest_version: int = 1 << 62
    """Number of the oldest weight version that drew a token."""
    versions: set[int] = field(default_factory=set)
    """Numbers of those that drew tokens."""
    is_truncated: bool = False
    """A length limit ended it."""
    is_cut: bool = False
    """It would have called another tool."""
    num_turns: int = 1
    num_forks: int = 0
    """Turns whose prompt was no longer what earlier turns had been."""
    num_calls: int = 0
    num_failures: int = 0
    own_reward: tuple[str, float | None] | None = None
    """Its environment's class, and what that gives; None: it gives none."""

    def add_turn(self, result: Mapping[str, Any], oldest: int) -> None:
        """Count in an engine's result whose oldest version is `oldest`."""
        meta = result["meta_info"]
        self.completion_ids += result["output_ids"]
        self.oldest_version = min(self.oldest_version, oldest)
        self.versions |= {span["number"] for span in meta["weight_versions"]}
        self.is_truncated = meta["finish_reason"]["type"] == "length"


@dataclass(frozen=True, slots=True)
class Group:
    """The completions for one row of the data set, whole."""

    row: Mapping[str, Any]
    rollouts: list[Rollout]


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


async def rewards_of(
    group: Group, reward_funcs: Sequence[RewardFunc], owners: Sequence[str] = ()
) -> np.ndarray:
    """Rewards, shape (functions and owners, samples), NaN where there is none; functions that block run on a thread.

    owners: classes of environments that score conversations themselves.
    """
    size = len(group.rollouts)
    columns = {
        key: [value] * size for key, value in group.row.items() if key not in _NOT_FOR_REWARDS
    }
    call = {
        "prompts": [rollout.prompt for rollout in group.rollouts],
        "completions": [rollout.completion for rollout in group.rollouts],
        "completion_ids": [rollout.completion_ids for rollout in group.rollouts],
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
    for owner in owners:
        own = [rollout.own_reward for rollout in group.rollouts]
        values = [None if pair is None or pair[0] != owner else pair[1] for pair in own]
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
    """TRL's `RolloutSample`s, one for each row, with its conversation's advantage."""
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    advantages, total, std = advantages_of(rewards)
    has_calls = any(rollout.num_calls for rollout in group.rollouts)
    samples = []
    for i, rollout in enumerate(group.rollouts):
        metrics = {"reward": float(total[i]), "reward_std": std}
        metrics |= {f"rewards/{name}": float(rewards[k, i]) for k, name in enumerate(names)}
        if has_calls:
            metrics["tools/call_frequency"] = float(rollout.num_calls)
            metrics["tools/failure_frequency"] = rollout.num_failures / max(1, rollout.num_calls)
        for row in rollout.rows:
            samples.append(
                RolloutSample(
                    prompt=rollout.prompt,
                    completion=rollout.completion,
                    input_ids=np.array(row.input_ids, dtype=np.int64),
                    completion_mask=np.array(row.completion_mask, dtype=np.int64),
                    old_log_probs=np.array(row.old_log_probs, dtype=np.float32),
                    advantage=float(advantages[i]),
                    model_version=policies[i],
                    group_id=group_id,
                    metrics=dict(metrics),
                )
            )
    return samples
