"""`attach(trainer, engine)`: a TRL trainer generates with an engine, and publishes into it.

TRL has one place where completions come from. Behind its switch for vLLM the trainer also computes what belongs to a
generator in another process: the importance-sampling correction, and the metric `sampling/sampling_logp_difference`,
which shows that trainer and engine compute the same numbers. `attach` turns that switch and puts the engine there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rollout import Engine
from rollout.errors import InvalidRequestError
from weight_sync import WeightPublisher

from .contract import check_trainer
from .sampling import check_repeated, runs, sample, sampling_params
from .weights import WeightSync, around_training

_NEVER = -1


class EngineGeneration:
    """Where the trainer's completions come from: what TRL calls `trainer.vllm_generation`."""

    def __init__(self, trainer: Any, weights: WeightSync) -> None:
        self._trainer = trainer
        self._weights = weights
        self.engine = weights.engine
        """This rank's engine."""

    @property
    def publishes(self) -> bool:
        """This rank is the one that publishes into its engine."""
        return self._weights.publishes

    def sync_weights(self) -> None:
        """Called by the trainer, on every rank, before it generates, when `global_step` has changed."""
        self._weights.publish(f"step {self._trainer.state.global_step}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[Any, list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """One completion for each of this rank's `prompts`, which the trainer has repeated already.

        Returns prompts, completions, and log-probabilities and ids of the sampled tokens, each in a list of its own:
        [completion][token][0].
        """
        if images is not None and any(image is not None for image in images):
            raise InvalidRequestError(
                "got images, expected text; this engine generates from text alone"
            )
        trainer = self._trainer
        if (
            getattr(trainer, "environment_factories", None) is None
        ):  # Those may begin each sample differently.
            whole = trainer.accelerator.num_processes == 1
            check_repeated(runs(prompts), num_generations, whole=whole)
        with profiler or nullcontext():
            sampled = sample(
                self.engine, prompts, sampling_params(trainer), version=self._weights.version
            )
        logprobs = [[[value] for value in row] for row in sampled.logprobs]
        ids = [[[token] for token in row] for row in sampled.completion_ids]
        return prompts, sampled.completion_ids, logprobs, ids

    def release(self) -> None:
        """Give back what publishing took, until `sync_weights` is called again; done whenever `train()` ends."""
        self._weights.release()

    def close(self) -> None:
        """Give back what publishing took, and the connection to an address; the engine goes on."""
        self._weights.close()


def attach(
    trainer: Any, engine: Engine | str | None, *, publisher: WeightPublisher | None = None
) -> EngineGeneration:
    """Let a `GRPOTrainer` or `RLOOTrainer` of TRL generate with `engine`, on every rank, before `train()`.

    trainer: made without `use_vllm`. engine: an `Engine`, a `RolloutPool`, a connected one, or an address. With several
        ranks each gives its own, or all give the address of one, or rank 0 alone has one and the others give None.
    publisher: for options of its own, such as `WeightPublisher(engine, transport="process_group", ...)`.

    From then on the trainer publishes its parameters before it generates, whenever `global_step` has changed (adapters
    are merged while they are packed; sharded ones are gathered), generates on every rank that rank's prompts, corrects
    by importance sampling (`vllm_importance_sampling_correction` of its settings, on by default) and logs
    `sampling/sampling_logp_difference`. GRPO and RLOO, training and evaluation, tools, plain and conversational data.

    Raises `ConfigError` for another TRL, another trainer, or options that this engine does not have; while it trains,
    `RolloutError` for completions that TRL would silently train wrongly on, and what `WeightPublisher.publish` raises.
    """
    check_trainer(trainer)
    generation = EngineGeneration(trainer, WeightSync(trainer, engine, publisher))
    trainer.vllm_generation = generation
    trainer.vllm_mode = "server"
    trainer.use_vllm = True
    trainer._last_loaded_step = _NEVER

    def forget() -> None:
        trainer._last_loaded_step = _NEVER

    def end() -> None:
        forget()
        generation.release()

    around_training(trainer, begins=forget, ends=end)
    return generation
