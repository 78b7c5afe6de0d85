"""TRL's trainers whose parameters are spread over ranks, or partitioned: what each rank sees, and what is published."""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from trl_support import data, make_trainer, poison, run_ranks

from rollout.errors import ConfigError, NonFiniteWeightsError
from trainers_integration.trl import attach

pytestmark = pytest.mark.trl

TOLERANCE = 1e-4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["shared", "own", "fsdp2"])
def test_several_ranks_of_a_trainer_sample_from_what_was_published(task, tmp_path, mode):
    """`shared`: rank 0 has an engine, rank 1 uses it, and groups lie across both; `own`: an engine each; `fsdp2`: as
    `shared`, and each rank holds its part of every parameter, as accelerate cuts them."""
    said = run_ranks(task[0], tmp_path, mode)
    for row in said:
        assert row["label"] == "step 2"
        assert row["served"] == row["expected"]
        assert len(row["differences"]) == 3
        assert max(row["differences"]) < TOLERANCE
        assert row["is_sharded"] == (mode == "fsdp2")
    assert [row["publishes"] for row in said] == [True, mode == "own"]
    if mode == "fsdp2":
        assert sum(row["held"] for row in said) == said[0]["all"]
    if mode != "shared":
        return
    # What one rank cannot publish is an error on all, and the engine serves what it did.
    assert said[0]["error"].startswith("NonFiniteWeightsError")
    assert said[1]["error"].startswith("WeightUpdateError: rank 0 could not publish")
    assert all(row["served_after_error"] == row["expected"] for row in said)


class Partitioned:
    """Parameters as deepspeed's ZeRO-3 leaves them: empty, but inside `GatheredParameters`, which is noted."""

    def __init__(self, model):
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.calls = []
        self._whole = {id(parameter): parameter.data for parameter in model.parameters()}
        for parameter in model.parameters():
            parameter.data = torch.empty(0)

    @contextmanager
    def gathered(self, parameters):
        """What is done to parameters inside is lost, and the memory that they were gathered into is used again."""
        self.calls.append([self.names[id(parameter)] for parameter in parameters])
        for parameter in parameters:
            parameter.data = self._whole[id(parameter)].clone()
        yield
        for parameter in parameters:
            parameter.data.fill_(float("nan"))
            parameter.data = torch.empty(0)


@pytest.fixture
def partition(monkeypatch):
    """`partition(trainer)`: its parameters as ZeRO-3's, which TRL gathers with a `deepspeed` that notes it."""

    def make(trainer):
        made = Partitioned(trainer.model)
        deepspeed = ModuleType("deepspeed")
        deepspeed.__spec__ = ModuleSpec("deepspeed", None)
        deepspeed.zero = SimpleNamespace(GatheredParameters=made.gathered)
        monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
        monkeypatch.setattr(type(trainer._dist), "is_zero3", True)
        return made

    return make


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapted"])
def test_partitioned_parameters_are_gathered_to_be_published(task, engine, partition, adapted):
    """One at a time; all at once where adapters are merged, as TRL does it."""
    from peft import LoraConfig

    folder, examples = task
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    options = {"peft_config": lora} if adapted else {}
    trainer = make_trainer("GRPO", folder, data(examples), **options)
    attach(trainer, engine).sync_weights()
    expected = engine.weights_fingerprint()
    poison(engine)
    assert engine.weights_fingerprint() != expected

    trainer.use_vllm = False
    partitioned = partition(trainer)
    attach(trainer, engine).sync_weights()
    names = list(partitioned.names.values())
    assert partitioned.calls == ([names] if adapted else [[name] for name in names])
    assert engine.weights_fingerprint() == expected
    assert engine.weight_version == "step 0"


def test_a_refused_update_leaves_no_rank_alone_in_a_gather(task, engine, partition):
    folder, examples = task
    trainer = make_trainer("GRPO", folder, data(examples))
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    partitioned = partition(trainer)
    served = engine.weights_fingerprint()
    with pytest.raises(NonFiniteWeightsError):
        attach(trainer, engine).sync_weights()
    assert partitioned.calls == [[name] for name in partitioned.names.values()]
    assert engine.weights_fingerprint() == served


def test_another_way_to_gather_shards_is_refused_before_a_step(task, engine, monkeypatch):
    """Only where parameters are sharded is what gathers them looked for."""
    folder, examples = task
    trainer = make_trainer("GRPO", folder, data(examples))
    monkeypatch.delattr("trl.generation.vllm_generation.VLLMGeneration._iter_named_params")
    attach(trainer, engine).close()
    trainer.use_vllm = False
    trainer._dist.zero_stage = 3
    with pytest.raises(ConfigError, match=r"sharded parameters.*_iter_named_params.*pip install"):
        attach(trainer, engine)
