"""`rollout_func(engine)`: the hook of `GRPOTrainer` that TRL documents, with nothing private."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rollout import Engine
from weight_sync import WeightPublisher

from .contract import check_version
from .sampling import check_repeated, runs, sample, sampling_params, token_ids
from .weights import WeightSync

RolloutFunc = Callable[[list[Any], Any], dict[str, Any]]


def rollout_func(
    engine: Engine | str | None, *, publisher: WeightPublisher | None = None
) -> RolloutFunc:
    """A `rollout_func` for `GRPOTrainer` that generates with `engine` and publishes when `global_step` has changed.

    Arguments are those of `attach`. TRL calls it with prompts that it has repeated, as text or as messages, and looks
    at the log-probabilities it returns only where `off_policy_mask_threshold` is set: without `attach` there is no
    importance-sampling correction, and no metric of the difference. Use it where TRL's private attributes must not be
    touched; one function serves one trainer.
    """
    check_version()
    weights: WeightSync | None = None
    published_step: int | None = None

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        nonlocal weights, published_step
        if weights is None:
            weights = WeightSync(trainer, engine, publisher)
        step = trainer.state.global_step
        if step != published_step:
            weights.publish(f"step {step}")
            published_step = step
        prompt_ids = _prompt_ids(trainer, prompts)
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        check_repeated(runs(prompt_ids), size, whole=trainer.accelerator.num_processes == 1)
        sampled = sample(
            weights.engine, prompt_ids, sampling_params(trainer), version=weights.version
        )
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": sampled.completion_ids,
            "logprobs": sampled.logprobs,
        }

    return rollout


def _prompt_ids(trainer: Any, prompts: list[Any]) -> list[list[int]]:
    return token_ids(
        trainer.processing_class,
        prompts,
        chat_template=getattr(trainer, "chat_template", None),
        **(getattr(trainer, "chat_template_kwargs", None) or {}),
    )
