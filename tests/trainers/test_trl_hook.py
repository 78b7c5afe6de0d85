"""The hook that TRL documents, and what is left when a trainer has ended."""

import threading
from pathlib import Path

import pytest
import torch
from trl_support import data, exact, make_trainer, poison

from rollout import Engine
from trainers_integration.trl import attach, rollout_func
from weight_sync import fingerprint

pytestmark = pytest.mark.trl


@pytest.fixture
def elsewhere(task):
    """The same in a process of its own."""
    with Engine(task[0], seed=0, executor="local", num_threads=1) as engine:
        poison(engine)
        yield engine


def test_the_documented_hook_works_without_private_attributes(task, engine):
    folder, examples = task
    seen = []

    def reward(completions, answer, **columns):
        seen.append(exact(completions, answer))
        return seen[-1]

    trainer = make_trainer(
        "GRPO",
        folder,
        data(examples, conversational=True),
        reward_funcs=reward,
        rollout_func=rollout_func(engine),
        args={"off_policy_mask_threshold": 0.5},  # TRL looks at the log-probabilities with it
    )
    trainer.train()
    assert engine.status().weight_version == "step 2"
    assert sum(map(sum, seen)) / sum(map(len, seen)) > 0.05  # poisoned weights get nothing


def present():
    """Threads of this process, and pieces of memory that it shares with others."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return set(threading.enumerate()), sum("memfd:weight-arena" in line for line in maps)


@pytest.mark.parametrize("way", ["hook", "attach"])
def test_when_training_ends_nothing_of_publishing_is_left(task, elsewhere, way):
    """Neither the arena nor the connection; an evaluation takes both again, for the weights of then."""
    folder, examples = task
    hook = rollout_func(elsewhere.address)
    options = {"rollout_func": hook} if way == "hook" else {}
    trainer = make_trainer("GRPO", folder, data(examples), args={"max_steps": 2}, **options)
    before = present()
    ends = hook if way == "hook" else attach(trainer, elsewhere)
    for _ in range(2):  # `global_step` begins again at 0
        trainer.train()
        assert present() == before
        assert elsewhere.weight_version == "step 1"

    with torch.no_grad():
        next(trainer.model.parameters()).mul_(1.5)
    trainer.evaluate(data(examples, split="heldout"))
    assert elsewhere.weights_fingerprint() == fingerprint(trainer.model)
    assert present() != before
    ends.close()
    assert present() == before


def test_a_hook_that_is_given_another_trainer_publishes_that_ones_weights(task, engine):
    folder, examples = task
    hook = rollout_func(engine)
    for scale in (1.0, 1.5):
        trainer = make_trainer("GRPO", folder, data(examples), rollout_func=hook)
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(scale)
        trainer.evaluate(data(examples, split="heldout"))
        assert engine.weights_fingerprint() == fingerprint(trainer.model)
    hook.close()
