"""One run of the demo, from an empty folder to a report."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import deque
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from rollout import Engine
from rollout.errors import RolloutError
from weight_sync import WeightPublisher, fingerprint

from ..grpo.learner import Learner
from ..grpo.loop import GrpoLoop
from ..grpo.records import StepRecord
from ..grpo.rollouts import sample
from ..ppo import PpoLearner, PpoLoop
from .config import DemoConfig
from .data import make_dataset, read_dataset, write_dataset
from .environment import SortingEnvironment
from .model import build_model, save_checkpoint, warm_start
from .recorder import SUMMARY_FILE, Recorder, Row, summarize
from .report import check_can_draw, write_report
from .screen import Screen
from .tokenizer import build_tokenizer


def run_demo(config: DemoConfig, screen: Screen) -> Row:
    """Everything; returns the summary, which is also in the run's folder. `screen` began counting the seconds."""
    check_can_draw()
    disable_progress_bar()
    torch.set_num_threads(config.trainer_threads)
    with closing(Recorder(config.folder)) as recorder:
        run = _Run(config, screen, recorder)
        run.prepare()
        with run.start_engine() as engine, WeightPublisher(engine) as publisher:
            run.control(engine)
            run.train(engine, publisher)
            run.check_saved_model(engine)
            run.in_flight(engine, publisher)
    summary = summarize(recorder.rows) | {
        "algorithm": config.algorithm,
        "mode": config.mode,
        "seed": config.seed,
    }
    summary["seconds"] = screen.seconds
    screen.say("report    drawing")
    pictures = write_report(config.folder, summary, settings=dataclasses.asdict(config))
    summary["seconds"] = screen.seconds
    (config.folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    screen.finish(summary, config.folder, pictures)
    return summary


class _Run:
    """The parts of a run, in the order in which they happen."""

    def __init__(self, config: DemoConfig, screen: Screen, recorder: Recorder) -> None:
        self.config = config
        self.screen = screen
        self.recorder = recorder
        self.folder = recorder.folder

    def prepare(self) -> None:
        """Data set, tokenizer, model and warm start: the checkpoint that the engine starts from."""
        config, say = self.config, self.screen.say
        path = config.data.path or self._write_dataset()
        self.tokenizer = build_tokenizer()
        self.examples = read_dataset(path)
        environment = self._environment()
        num_train, num_heldout = len(environment.training), len(environment.heldout)
        say(f"data      {num_train:,} training prompts and {num_heldout:,} held-out ones in {path}")
        self.model = build_model(config.model, seed=config.seed)
        steps, rate = warm_start(
            self.model, self.tokenizer, environment.training, config.warm_start, seed=config.seed
        )
        folder = self.folder / "checkpoint-start"
        save_checkpoint(folder, self.model, self.tokenizer)
        say(
            f"model     {self.model.num_parameters():,} parameters, {steps} supervised steps "
            f"(expected pass rate {rate:.2f}), in {folder}"
        )

    def start_engine(self) -> Engine:
        """The engine, in a process of its own, serving version 0."""
        config = self.config
        engine = Engine(
            self.folder / "checkpoint-start",
            executor="local",
            seed=config.seed,
            num_threads=config.engine_threads,
            max_running_requests=config.max_running_requests,
            context_length=config.model.max_position_embeddings,
            enable_return_routed_experts=config.grpo.replay_experts,
        )
        self.screen.say(f"engine    runs in process {engine.status().pid}, at {engine.address}")
        return engine

    def control(self, engine: Engine) -> None:
        """The same loop with the engine left as it is: what the trainer learns never shows in its rollouts."""
        steps = self.config.control_steps
        if steps == 0:
            return
        loop = self._loop(engine, None, copy.deepcopy(self.model))
        self.recorder.measured("control", self._evaluate(engine, final=True))
        self._follow("control", "control, never synced", loop.synchronous(steps), steps, engine)

    def train(self, engine: Engine, publisher: WeightPublisher) -> None:
        """The run itself."""
        config, steps = self.config, self.config.grpo.steps
        before = self._evaluate(engine, final=True)
        self.recorder.measured("train", before)
        self.screen.say(f"before    held-out prompts: sampled pass rate {before:.2f}")
        self.loop = self._loop(engine, publisher, self.model)
        ways = {
            "sync": self.loop.synchronous,
            "async": self.loop.asynchronous,
            "continuous": self.loop.continuous,
        }
        records = ways[config.mode](steps)
        tail = self._follow(
            "train", f"{config.algorithm.upper()}, {config.mode}", records, steps, engine
        )
        if config.mode != "sync":
            self.recorder.keep_timeline(tail)

    def _loop(self, engine: Engine, publisher: WeightPublisher | None, model: Any) -> GrpoLoop:
        config = self.config
        if config.algorithm == "grpo":
            learner = Learner(model, config.grpo, seed=config.seed)
            return GrpoLoop(engine, publisher, learner, self._environment())
        critic_too = PpoLearner(model, config.grpo, config.ppo, seed=config.seed)
        return PpoLoop(engine, publisher, critic_too, self._environment())

    def in_flight(self, engine: Engine, publisher: WeightPublisher) -> None:
        """A synchronous run goes on for a few steps asynchronously: weights change under running requests.

        It comes after the last measurement and after saving, so that those repeat with the seed.
        """
        steps = self.config.in_flight_steps
        if self.config.mode != "sync" or steps == 0:
            return
        records = self.loop.asynchronous(steps)
        tail = self._follow("in_flight", "publishing in flight", records, steps, engine)
        self.recorder.keep_timeline(tail)

    def check_saved_model(self, engine: Engine) -> None:
        """Save the policy and reload it with transformers: it must be bit for bit what the engine serves."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.folder / "checkpoint"
        save_checkpoint(folder, self.model, self.tokenizer)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        saved, served = fingerprint(reloaded), engine.weights_fingerprint()
        if saved != served:
            raise RolloutError(
                f"{folder} is not what the engine serves: got fingerprint {saved:016x}, expected {served:016x} "
                f"of version {self.loop.version}; the last weight update did not reach the engine"
            )
        if AutoTokenizer.from_pretrained(folder).get_vocab() != self.tokenizer.get_vocab():
            raise RolloutError(
                f"{folder}: the tokenizer did not survive saving; remove the folder and run again"
            )
        self.screen.say(f"saved     {folder}, reloads as what the engine serves ({served:016x})")

    def _environment(self) -> SortingEnvironment:
        """From its beginning: the control draws the same problems as the run."""
        return SortingEnvironment(
            self.examples,
            self.tokenizer,
            max_new_tokens=self.config.grpo.max_new_tokens,
            partial_credit=self.config.partial_credit,
            seed=self.config.seed,
        )

    def _write_dataset(self) -> Path:
        path, data = self.folder / "data.jsonl", self.config.data
        examples = make_dataset(
            num_train=data.num_train,
            num_heldout=data.num_heldout,
            num_digits=data.num_digits,
            seed=self.config.seed,
        )
        write_dataset(path, examples)
        return path

    def _follow(
        self, phase: str, title: str, records: Iterable[StepRecord], steps: int, engine: Engine
    ) -> list[StepRecord]:
        """Run a phase to its end, record it, and measure on the way; returns the last few records."""
        tail: deque[StepRecord] = deque(maxlen=max(1, self.config.in_flight_steps))
        with self.screen.phase(title, steps) as listen:
            for count, record in enumerate(records, start=1):
                last = count == steps
                measure = phase != "in_flight" and (last or count % self.config.eval.every == 0)
                heldout = self._evaluate(engine, final=last) if measure else None
                self.recorder.step(phase, record, heldout)
                listen(record, heldout)
                tail.append(record)
        return list(tail)

    def _evaluate(self, engine: Engine, *, final: bool) -> float:
        """Share of sampled completions of held-out prompts that are right, by the weights that the engine serves."""
        sampling, num_samples = (
            self.config.grpo.sampling_params,
            self.config.eval.samples_per_prompt,
        )
        if final:
            num_samples = self.config.eval.final_samples_per_prompt
        environment = self._environment()
        prompts = [problem.prompt_ids for problem in environment.heldout]
        groups = sample(engine, prompts, sampling | {"n": num_samples})
        passed = [
            environment.score(problem, completion).passed
            for problem, group in zip(environment.heldout, groups, strict=True)
            for completion in group
        ]
        return sum(passed) / len(passed)
