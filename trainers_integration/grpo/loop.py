"""The GRPO loop: how a trainer drives the engine. Start reading here.

Trainer and engine are two processes. The trainer asks for completions (`engine.generate`), learns from them
(`learner.learn`) and pushes its parameters into the engine (`publisher.publish`), which goes on with the next token.

* Synchronous: generate, learn, publish, one after the other. Every token is sampled by the trainer's own policy.
* Asynchronous: the engine samples batch k + 1 while the trainer learns from batch k and publishes after each optimiser
  step, so that new weights arrive under running requests. A completion then has tokens of several versions. Each
  token's log-probability is that of the version which sampled it, and `losses.py` corrects for the difference with it.
* Continuous: there are no batches on the engine's side. Prompts go in one by one as others come out, the trainer takes
  groups in the order in which they finish, and leaves out those that are more than `max_staleness` versions old.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from weight_sync import WeightPublisher

from .advantages import group_advantages
from .batch import make_batch
from .environment import Environment, Problem
from .learner import Learner
from .records import StepRecord, SyncRecord, mean_staleness, mixed_fraction
from .rollouts import Completion, parse_completion, sample, sample_in_flight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampled:
    """One batch as it came from the engine."""

    problems: Sequence[Problem]
    groups: list[list[Completion]]
    seconds: float
    num_dropped: int = 0


class GrpoLoop:
    """One training run against one engine. All three ways to run it yield a `StepRecord` after each step.

    Without a `publisher` the engine keeps the weights that it has: the control of an experiment. Labels of weight
    versions must be their numbers: what an engine starts with by default, and what is published here.
    """

    def __init__(
        self,
        engine: Any,
        publisher: WeightPublisher | None,
        learner: Learner,
        environment: Environment,
    ) -> None:
        self.engine = engine
        self.publisher = publisher
        self.learner = learner
        self.environment = environment
        self.config = learner.config
        self.version = int(engine.get_weight_version())
        self.num_steps = 0

    def synchronous(self, steps: int) -> Iterator[StepRecord]:
        """Generate, learn, publish, one after the other."""
        for _ in range(steps):
            started = time.perf_counter()
            batch = self._generate(self._draw())
            yield self._learn_and_publish(batch, started, after_each_update=False)

    def asynchronous(self, steps: int) -> Iterator[StepRecord]:
        """While the trainer learns from a batch, the engine samples the next and gets each update at once."""
        with ThreadPoolExecutor(1, thread_name_prefix="generate") as background:
            in_flight = background.submit(self._generate_in_flight, self._draw())
            for step in range(steps):
                started = time.perf_counter()
                batch = in_flight.result()
                if step + 1 < steps:
                    in_flight = background.submit(self._generate_in_flight, self._draw())
                yield self._learn_and_publish(batch, started, after_each_update=True)

    def continuous(self, steps: int) -> Iterator[StepRecord]:
        """The engine is never without work: it goes on with later prompts while the trainer learns."""
        problems: dict[int, Problem] = {}
        config = self.config
        stream = self.engine.as_completed(
            input_ids=self._prompts(problems),
            sampling_params=config.sampling_params,
            max_in_flight=config.prompts_per_step + config.prompts_in_flight,
            return_logprob=True,
            return_token_times=True,
            return_routed_experts=config.replay_experts,
        )
        with closing(stream):
            for _ in range(steps):
                started = time.perf_counter()
                batch = self._take(stream, problems)
                yield self._learn_and_publish(batch, started, after_each_update=True)

    def _prompts(self, problems: dict[int, Problem]) -> Iterator[list[int]]:
        """Prompts without end; `problems` gets what each is about, by its place."""
        for place in itertools.count():
            (problems[place],) = self.environment.draw(1)
            yield list(problems[place].prompt_ids)

    def _take(
        self, stream: Iterator[tuple[int, list[dict[str, Any]]]], problems: dict[int, Problem]
    ) -> _Sampled:
        """The next groups that are fresh enough, as many as make a batch."""
        started = time.perf_counter()
        taken: list[Problem] = []
        groups: list[list[Completion]] = []
        num_dropped = 0
        for place, results in stream:
            problem = problems.pop(place)
            group = [parse_completion(problem.prompt_ids, result) for result in results]
            oldest = min(span.version for completion in group for span in completion.spans)
            if self.version - oldest > self.config.max_staleness:
                num_dropped += 1
                continue
            taken.append(problem)
            groups.append(group)
            if len(groups) == self.config.prompts_per_step:
                break
        seconds = time.perf_counter() - started
        return _Sampled(problems=taken, groups=groups, seconds=seconds, num_dropped=num_dropped)

    def _draw(self) -> Sequence[Problem]:
        return self.environment.draw(self.config.prompts_per_step)

    def _generate(self, problems: Sequence[Problem]) -> _Sampled:
        """A group of completions for every problem, from the engine."""
        started = time.perf_counter()
        prompts = [problem.prompt_ids for problem in problems]
        groups = sample(
            self.engine, prompts, self.config.sampling_params, routes=self.config.replay_experts
        )
        return _Sampled(problems=problems, groups=groups, seconds=time.perf_counter() - started)

    def _generate_in_flight(self, problems: Sequence[Problem]) -> _Sampled:
        """The same, a few problems at a time; runs on the background thread."""
        started = time.perf_counter()
        prompts = [problem.prompt_ids for problem in problems]
        limit = self.config.prompts_in_flight
        call = sample_in_flight(
            self.engine,
            prompts,
            self.config.sampling_params,
            prompts_in_flight=limit,
            routes=self.config.replay_experts,
        )
        groups = asyncio.run(call)
        return _Sampled(problems=problems, groups=groups, seconds=time.perf_counter() - started)

    def _learn_and_publish(
        self, sampled: _Sampled, started: float, *, after_each_update: bool
    ) -> StepRecord:
        """Score the batch, update the policy, push it into the engine."""
        scores = [
            [self.environment.score(problem, completion) for completion in group]
            for problem, group in zip(sampled.problems, sampled.groups, strict=True)
        ]
        rewards = torch.tensor([[score.reward for score in group] for group in scores])
        advantages = self._advantages(rewards)
        completions = [completion for group in sampled.groups for completion in group]
        staleness = mean_staleness(completions, self.version)
        own_version = None if self.publisher is None else self.version

        syncs: list[SyncRecord] = []
        learn_started = time.perf_counter()
        stats = self.learner.learn(
            make_batch(completions, advantages.flatten(), version=own_version),
            after_update=(lambda: syncs.extend(self._publish())) if after_each_update else None,
        )
        learn_s = time.perf_counter() - learn_started - sum(sync.sync_s for sync in syncs)
        if not after_each_update:
            syncs.extend(self._publish())

        self.num_steps += 1
        return StepRecord(
            step=self.num_steps,
            reward=rewards.mean().item(),
            pass_rate=sum(s.passed for group in scores for s in group) / len(completions),
            num_tokens=sum(len(c.output_ids) for c in completions),
            mixed_fraction=mixed_fraction(completions),
            staleness=staleness,
            generate_s=sampled.seconds,
            learn_s=learn_s,
            step_s=time.perf_counter() - started,
            num_dropped=sampled.num_dropped,
            learn=stats,
            syncs=tuple(syncs),
            completions=tuple(completions),
        )

    def _advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """What the learner is given for each completion, shape (prompts, samples), from rewards of that shape."""
        return group_advantages(rewards, normalize_std=self.config.normalize_std)

    def _publish(self) -> list[SyncRecord]:
        """Push the policy into the engine; when this returns, it serves the new version, verified bit for bit."""
        if self.publisher is None:
            return []
        started = time.time()
        version = self.version + 1
        report = self.publisher.publish(self.learner.model, version=version, label=str(version))
        finished = time.time()
        self.version = report.version
        verifying_s = report.begin_to_verified_s - report.begin_to_committed_s
        return [
            SyncRecord(
                version=report.version,
                started_at=started,
                committed_at=finished - verifying_s,
                sync_s=finished - started,
                pause_s=report.pause_s,
            )
        ]
