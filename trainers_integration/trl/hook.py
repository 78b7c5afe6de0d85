"""`rollout_func(engine)`: the hook of `GRPOTrainer` that TRL documents, with nothing private."""

from __future__ import annotations

import weakref
from typing import Any

from rollout import Engine
from weight_sync import WeightPublisher

from .contract import check_version
from .sampling import check_repeated, runs, sample, sampling_params, token_ids
from .weights import WeightSync, around_training


class EngineRollout:
    """What `rollout_func` returns, and TRL calls: completions of an engine, for one trainer."""

    def __init__(self, engine: Engine | str | None, publisher: WeightPublisher | None) -> None:
        self._engine = engine
        self._publisher = publisher
        self._known: weakref.ref[Any] | None = None
        self._weights: WeightSync | None = None
        self._published_step: int | None = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One completion for each of `prompts`, texts or messages that TRL has repeated; called by TRL, on every rank.

        Returns `prompt_ids`, `completion_ids` and `logprobs`, a list for each prompt in each.
        """
        weights = self._synced(trainer)
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

    def close(self) -> None:
        """Give back what publishing took, and the connection to an address; the engine goes on.

        Called whenever `train()` ends. Safe to repeat; a later call of the trainer opens both again.
        """
        weights, self._weights = self._weights, None
        self._published_step = None
        if weights is not None:
            weights.close()

    def _synced(self, trainer: Any) -> WeightSync:
        """The way into the engine, which serves the trainer's present weights."""
        if self._known is None or self._known() is not trainer:
            self.close()
            self._known = weakref.ref(trainer)
            around_training(trainer, begins=self._forget, ends=self.close)
        if self._weights is None:
            self._weights = WeightSync(trainer, self._engine, self._publisher)
        step = trainer.state.global_step
        if step != self._published_step:
            self._weights.publish(f"step {step}")
            self._published_step = step
        return self._weights

    def _forget(self) -> None:
        self._published_step = None


def rollout_func(
    engine: Engine | str | None, *, publisher: WeightPublisher | None = None
) -> EngineRollout:
    """A `rollout_func` for `GRPOTrainer` that generates with `engine` and publishes when `global_step` has changed.

    Arguments are those of `attach`. TRL calls it with prompts that it has repeated, as text or as messages, and looks
    at the log-probabilities it returns only where `off_policy_mask_threshold` is set: without `attach` there is no
    importance-sampling correction, and no metric of the difference. Use it where TRL's private attributes must not be
    touched; one function serves one trainer. It gives back what it took when `train()` ends; after an evaluation of
    its own, its `close()` does.
    """
    check_version()
    return EngineRollout(engine, publisher)


def _prompt_ids(trainer: Any, prompts: list[Any]) -> list[list[int]]:
    return token_ids(
        trainer.processing_class,
        prompts,
        chat_template=getattr(trainer, "chat_template", None),
        **(getattr(trainer, "chat_template_kwargs", None) or {}),
    )
