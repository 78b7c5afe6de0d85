"""A demo small enough for tests: two layers, a few digits, a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rollout import Engine
from rollout.settings import load_settings

sys.path.insert(0, str(Path(__file__).parent))  # for `trl_support`


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The folder of a checkpoint that TRL is to teach to sort, and the examples."""
    from trl_support import write_checkpoint

    folder = tmp_path_factory.mktemp("sorting")
    return folder, write_checkpoint(folder)


@pytest.fixture
def engine(task):
    """One that serves poisoned weights until somebody publishes."""
    from trl_support import poison

    with Engine(task[0], seed=0) as engine:
        poison(engine)
        yield engine


@pytest.fixture
def small_demo(tmp_path):
    """`small_demo("key=value", ...)`: settings of a demo that takes seconds and writes below the test's folder."""
    from trainers_integration.demo.config import DemoConfig

    small = [
        f'runs_dir="{tmp_path}"',
        "name=run",
        "control_steps=2",
        "in_flight_steps=3",
        "data={num_digits=3, num_train=64, num_heldout=16}",
        "model={hidden_size=32, num_layers=2}",
        "warm_start={max_steps=20, batch_size=32}",
        "eval={every=2, final_samples_per_prompt=2}",
        "grpo={steps=3, prompts_per_step=8, samples_per_prompt=4, max_new_tokens=5, minibatches=2}",
    ]

    def make(*overrides: str) -> DemoConfig:
        return load_settings(DemoConfig, None, [*small, *overrides])

    return make
