"""Tiny checkpoints that tests of all groups share: random models of every family with a byte-level tokenizer."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # for `versions`

from forks import Forking, Started, forking

# A busy machine is no fault, and a run is to say the same the next time; `--hypothesis-profile=random` looks further.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("steady", settings.get_profile("random"), derandomize=True)
settings.load_profile("steady")

STARTED_ANEW = {
    *("test_engine_lifetimes", "test_engine_executors", "test_receiving_process", "test_examples"),
}
"""Files that show how processes start. Those of others are forks, seconds sooner; not near a GPU, which forks lose."""

LONG = """
test_ray_deaths test_examples test_engine_rank_deaths test_trl_attach test_endings test_hostile_payloads
test_flash_backend test_deterministic test_deterministic_mixtures test_trl_ranks test_kernel_edges test_group_lengths
test_engine_process test_transports test_engine_updates test_many_engines test_pool_deaths test_overlapped_ranks
test_paged_attention test_sampling_kernels test_engine_trainer_deaths test_trl_async test_message_machine
test_group_machine test_pool_supervisor_machine test_commit_faults test_steps_of_two_ranks test_triton_backend
test_engine_lies test_finite_numbers test_grouped_experts test_layer_kernels test_demo_run test_description
test_attention_search test_pool_machine test_lm_eval test_wheel
""".split()
"""Files that take longest: they come first, so that no process has one left when the others have ended.

One of them has a cluster of Ray's: two that begin early would wait for each other.
"""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of `LONG` first; else, and inside each file, the order stays."""
    turn = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family, **config)`: a Hugging Face folder with weights and tokenizer.

    Made once per session for the same arguments: read it, do not write to it. `max_shard_size` goes to
    `save_pretrained`, every other keyword to the configuration.
    """
    from transformers.utils import logging

    from rollout.cli.tiny import tiny_model, tiny_tokenizer

    logging.disable_progress_bar()
    made: dict[str, Path] = {}

    def make(family: str, *, max_shard_size: str = "5GB", **overrides: Any) -> Path:
        key = repr((family, max_shard_size, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
            tiny_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference_model() -> Callable[[Path], Any]:
    """`reference_model(folder)`: the transformers model of a checkpoint, float32, read once per session."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: dict[Path, Any] = {}

    def load(folder: Path) -> Any:
        if folder not in loaded:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            loaded[folder] = model.eval().requires_grad_(False)
        return loaded[folder]

    return load


@pytest.fixture(scope="session")
def forks() -> Iterator[Forking]:
    """The processes that children of this one are forked from."""
    made = Forking()
    yield made
    made.close()


@pytest.fixture(scope="module", autouse=True)
def _children_are_forks(request: pytest.FixtureRequest, forks: Forking) -> Iterator[None]:
    if request.path.stem in STARTED_ANEW or os.path.exists("/dev/nvidiactl"):
        yield
        return
    with forking(forks):
        yield


def seed_from(name: str) -> None:
    """Numbers that are drawn from here on are the same in every run, and others than those of another name.

    A sum in another order is off by its rounding, so of samples that were drawn twice one in a million differs: which
    ones is not to change from run to run.
    """
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    if "torch" in sys.modules:  # Imported later, it begins at a seed that is always the same.
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def _a_file_draws_the_same_numbers(request: pytest.FixtureRequest) -> None:
    seed_from(request.path.name)


@pytest.fixture(autouse=True)
def _a_test_draws_the_same_numbers(request: pytest.FixtureRequest) -> None:
    seed_from(request.node.nodeid)


@pytest.fixture
def started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this test starts are no forks."""
    monkeypatch.setattr(subprocess, "Popen", Started)


@pytest.fixture(scope="module", autouse=True)
def _older_objects_are_no_garbage() -> None:
    """A collection in a test looks at what its file has made, not at the million objects of libraries and of pytest."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What libraries must free when this process ends is no longer set aside."""
    gc.unfreeze()
