"""`RolloutWorker(engine, reward_funcs, ...)`: completions for an `AsyncGRPOTrainer`, while it trains.

A thread of the trainer's process asks the engine for a group after another, some at once. A group goes on while the
trainer publishes: its later tokens are the new version's, each log-probability is of the version that drew the token,
and a sample bears the number of the oldest one, by which TRL drops what is too stale.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rollout import Engine
from rollout.errors import ConfigError, RolloutError

from .contract import check_engine, check_version
from .conversations import Conversations, EnvironmentFactory, Toolbox
from .groups import (
    Group,
    PolicyVersions,
    RewardFunc,
    Rollout,
    Row,
    reward_name,
    rewards_of,
    samples_of,
)
from .sampling import checked_logprobs, oldest_version, sampling_options, token_ids

logger = logging.getLogger(__name__)

_TICK_S = 0.05
_ANNOUNCE_S = 120.0
"""How long TRL may take from a commit to telling its number, with slow ranks in between."""
_STOP_S = 30.0
_METRICS = 4096


class RolloutWorker:
    """For `AsyncGRPOTrainer(rollout_worker=...)`; TRL calls every method, on rank 0.

    `rollout_buffer` and `metrics_queue` are queues that the trainer empties; a full buffer holds generation back.
    """

    def __init__(
        self,
        engine: Engine | str,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        *,
        args: Any,
        train_dataset: Any = None,
        processing_class: Any = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
    ) -> None:
        """engine: an `Engine`, a `RolloutPool`, a connected one, or an address.

        reward_funcs: as TRL's; they run on threads of this process, and may be coroutine functions. train_dataset: rows
            with `prompt` (text or messages) and columns for the reward functions; read in order, again and again. None:
            environments give the prompts.
        args: the trainer's `AsyncGRPOConfig`; a `token_budget` that is None becomes the engine's context length, for
            which TRL would ask a vLLM server. processing_class: the tokenizer; None: the engine's.
        tools, environment_factory: as TRL's; each sample is then a conversation of its own, of messages, and nothing
            needs to be picklable. An environment with `get_reward` is a reward function of its own.
        """
        check_version()
        check_engine(engine)
        self._owned = isinstance(engine, str)
        self.engine: Engine = Engine.connect(engine) if isinstance(engine, str) else engine
        self._reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or ())
        self._toolbox = Toolbox(tools, environment_factory)
        self._names = [reward_name(reward_func) for reward_func in self._reward_funcs]
        self._names += self._toolbox.owners
        self._dataset = train_dataset
        self._args = args
        self._tokenizer = processing_class or self.engine.tokenizer
        if self._tokenizer is None:
            raise ConfigError(
                "RolloutWorker: got neither processing_class nor an engine with a tokenizer; give the tokenizer"
            )
        if not self._names:
            raise ConfigError("RolloutWorker: got no reward function, expected at least one")
        if train_dataset is None and not self._toolbox.has_environments:
            raise ConfigError(
                "RolloutWorker: got neither train_dataset nor environment_factory, expected prompts from one of them"
            )
        if args.num_generations < 2:
            raise ConfigError(
                f"RolloutWorker: got num_generations={args.num_generations}, expected at least 2 to compare"
            )
        context_length = int(self.engine.status().resolved["context_length"] or 0)
        if args.token_budget is None:
            args.token_budget = context_length
        self._conversations = (
            Conversations(self._toolbox, self._tokenizer, args, context_length)
            if self._toolbox
            else None
        )
        self.rollout_buffer: queue.Queue[Any] = queue.Queue(maxsize=args.queue_maxsize)
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=_METRICS)
        self._versions = PolicyVersions()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._beat = time.monotonic()
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None

    # ---- what TRL calls ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; TRL calls it after its first update. A worker that runs goes on."""
        if self._thread is not None:
            return
        self._failure, self._beat = None, time.monotonic()
        self._thread = threading.Thread(target=self._main, name="trl-rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; what is being generated is aborted. Fine when it does not run."""
        thread, self._thread = self._thread, None
        if thread is not None:
            while thread.is_alive() and self._running is None:  # It has only just begun.
                time.sleep(_TICK_S)
            running = self._running
            if running is not None:
                loop, task = running
                with contextlib.suppress(RuntimeError):  # The loop has ended by itself.
                    loop.call_soon_threadsafe(task.cancel)
            thread.join(_STOP_S)
            self._running = None
            if thread.is_alive():  # An error here would keep TRL from ending the weight transfer.
                logger.warning(
                    "the rollout worker has not ended within %.0f s; look for a reward function that goes on",
                    _STOP_S,
                )
        if self._owned:
            self.engine.shutdown()

    def update_model_version(self, model_version: int) -> None:
        """The engine's present version is TRL's `model_version`."""
        self._versions.note(model_version, self.engine.version)

    def check_health(self, stale_after_s: float) -> None:
        """Raise `RolloutError` when the worker has failed, or has shown no sign of life for so long."""
        if self._failure is not None:
            raise RolloutError(
                f"the rollout worker has failed: {type(self._failure).__name__}: {self._failure}"
            ) from self._failure
        age = time.monotonic() - self._beat
        if self._thread is not None and age > stale_after_s:
            raise RolloutError(
                f"the rollout worker has been silent for {age:.0f} s, expected at most {stale_after_s:.0f}; look for a "
                "reward function that holds the interpreter"
            )

    # ---- the worker's thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # `check_health` raises it where somebody looks.
            while isinstance(error, BaseExceptionGroup):  # of a lane, and of a conversation in it
                error = error.exceptions[0]
            self._failure = error

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running = (asyncio.get_running_loop(), task)
        num_groups = max(1, self._args.max_inflight_tasks // self._args.num_generations)
        rows = self._rows()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._heart())
            for _ in range(num_groups):
                tasks.create_task(self._lane(rows))

    async def _heart(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_TICK_S)

    def _rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Rows of the data set with a number for their group, without end."""
        group_id = 0
        rows: Any = self._dataset if self._dataset is not None else [{}]
        while True:
            before = group_id
            for row in rows:
                yield group_id, row
                group_id += 1
            if group_id == before:
                raise RolloutError("the data set is empty: got no row, expected at least one")

    async def _lane(self, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> None:
        """One group after the other, each generated, scored and handed over."""
        for group_id, row in rows:
            started = time.monotonic()
            group = await self._generate(row)
            generated = time.monotonic()
            rewards = await rewards_of(group, self._reward_funcs, self._toolbox.owners)
            policies = [await self._policy_of(each.oldest_version) for each in group.rollouts]
            scored = time.monotonic()
            for sample in samples_of(group, rewards, self._names, policies, group_id):
                await self._hand_over(sample)
            waited = time.monotonic() - scored
            self._tell(group, generated - started, scored - generated, waited)

    async def _generate(self, row: Mapping[str, Any]) -> Group:
        size = self._args.num_generations
        options = sampling_options(self._args, [self._tokenizer.eos_token_id])
        if self._conversations is None:
            return Group(row, await self._completions(row["prompt"], {**options, "n": size}))

        async def turn(ids: list[int]) -> Mapping[str, Any]:
            result: Mapping[str, Any] = await self.engine.async_generate(
                input_ids=ids, sampling_params=options, return_logprob=True
            )
            return result

        async with asyncio.TaskGroup() as several:
            tasks = [
                several.create_task(self._conversations.converse(row, turn)) for _ in range(size)
            ]
        return Group(row, [task.result() for task in tasks])

    async def _completions(self, prompt: Any, params: Mapping[str, Any]) -> list[Rollout]:
        """All samples of a prompt at once, which is computed once."""
        template = self._args.chat_template_kwargs or {}
        ids = token_ids(self._tokenizer, [prompt], **template)[0]
        results = await self.engine.async_generate(
            input_ids=ids, sampling_params=params, return_logprob=True
        )
        outputs = [list(result["output_ids"]) for result in results]
        texts = self._tokenizer.batch_decode(outputs, skip_special_tokens=True)
        rollouts = []
        for result, output, text in zip(results, outputs, texts, strict=True):
            is_text = isinstance(prompt, str)
            rollout = Rollout(
                prompt=prompt,
                completion=text if is_text else [{"role": "assistant", "content": text}],
                rows=[Row.of_one_turn(ids, output, checked_logprobs(result))],
            )
            rollout.add_turn(result, oldest_version(result))
            rollouts.append(rollout)
        return rollouts

    async def _policy_of(self, version: int) -> int:
        deadline = time.monotonic() + _ANNOUNCE_S
        while (policy := self._versions.policy_of(version)) is None:
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"got tokens of weight version {version}, which the trainer did not announce within "
                    f"{_ANNOUNCE_S:.0f} s; nobody else may publish into its engine"
                )
            await asyncio.sleep(_TICK_S / 10)
        return policy

    async def _hand_over(self, sample: Any) -> None:
        while True:
            sample.enqueued_at = time.time()
            try:
                return self.rollout_buffer.put_nowait(sample)
            except queue.Full:
                await asyncio.sleep(_TICK_S)

    def _tell(self, group: Group, generate_s: float, score_s: float, waited_s: float) -> None:
        rollouts = group.rollouts
        lengths = [len(rollout.completion_ids) for rollout in rollouts]
        size = float(len(rollouts))

        def share(values: Iterable[float]) -> tuple[float, float]:
            return float(sum(values)), size

        metrics: dict[str, Any] = {
            "rollout/duration_s": generate_s,
            "rollout/score_s": score_s,
            "rollout/backpressure_s": waited_s,
            "rollout/mixed_frac": share(len(rollout.versions) > 1 for rollout in rollouts),
            "completions/mean_length": share(lengths),
            "completions/max_length": float(max(lengths)),
            "completions/min_length": float(min(lengths)),
            "completions/clipped_ratio": share(rollout.is_truncated for rollout in rollouts),
        }
        if self._conversations is not None:
            metrics |= {
                "tools/loop_exhausted_frac": share(rollout.is_cut for rollout in rollouts),
                "rollout/turns_mean": share(rollout.num_turns for rollout in rollouts),
                "rollout/turns_max": float(max(rollout.num_turns for rollout in rollouts)),
                "rollout/samples_per_rollout": share(len(rollout.rows) for rollout in rollouts),
                **self._conversations.counts,
            }
            self._conversations.counts.clear()
        with contextlib.suppress(queue.Full):  # Metrics never hold generation back.
            self.metrics_queue.put_nowait(metrics)
