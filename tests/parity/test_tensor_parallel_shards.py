"""Every rank's shards together are the model: ranks are threads here, and their collectives a shared list."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rollout.errors import ConfigError
from rollout.layers.single_group import SingleGroup
from rollout.models.build import build_model
from rollout.models.loader import DefaultModelLoader, DummyModelLoader, LoadConfig
from rollout.models.model_config import ModelConfig
from weight_sync.layout.holdings import Holdings, joint_problems


class ThreadGroup:
    """One rank of a group of threads."""

    def __init__(self, rank, size, barrier, shared):
        self.rank, self.size, self._barrier, self._shared = rank, size, barrier, shared

    @classmethod
    def make(cls, size):
        barrier, shared = threading.Barrier(size, timeout=60), [None] * size
        return [cls(rank, size, barrier, shared) for rank in range(size)]

    def _exchange(self, tensor):
        self._barrier.wait()
        self._shared[self.rank] = tensor.clone()
        self._barrier.wait()
        return list(self._shared)

    def all_reduce(self, tensor):
        return torch.stack(self._exchange(tensor)).sum(0)

    def room(self, shape, dtype):
        return None

    def all_gather(self, tensor, dim):
        return torch.cat(self._exchange(tensor), dim)


MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 16,
}
LAYOUTS = [
    ("llama", {"attention_bias": True, "mlp_bias": True}, 2, 1),
    ("llama", {"vocab_size": 289}, 2, 1),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "vocab_size": 290}, 4, 1),
    ("qwen2", {}, 4, 1),
    ("qwen3_moe", {**MOE, "head_dim": 16}, 2, 1),
    ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 80}, 2, 2),
    ("mixtral", {"num_local_experts": 4}, 4, 2),
    ("glm4_moe", GLM, 2, 2),
]
"""The second and third pad the vocabulary; four ranks share two KV heads. Last, over how many ranks experts are
spread."""


@pytest.mark.parametrize(("family", "overrides", "size", "ep_size"), LAYOUTS)
def test_ranks_together_give_the_log_probabilities_of_one(
    family, overrides, size, ep_size, tiny_checkpoint, hand_driver, reference_logprobs
):
    folder = tiny_checkpoint(family, **overrides)
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (3, 11, 19)]

    def run(group):
        driver = hand_driver(folder, tp=group, ep_size=ep_size)
        requests = [driver.request(ids) for ids in prompts]
        driver.step([(request, request.num_tokens - 1) for request in requests])
        driver.step([(request, 1) for request in requests])
        return [driver.logprobs(request) for request in requests]

    with ThreadPoolExecutor(size) as pool:
        by_rank = list(pool.map(run, ThreadGroup.make(size)))
    for results in by_rank:
        for ids, logprobs in zip(prompts, results, strict=True):
            assert (logprobs - reference_logprobs(folder, ids)).abs().max() < 1e-4


def ranks(config, size, ep_size=1):
    groups = ThreadGroup.make(size)
    return [build_model(config, torch.float32, "cpu", group, ep_size) for group in groups]


def assemble(models, name):
    """The whole tensor from all ranks; those that hold the same part must agree."""
    whole = torch.full(models[0].weight_map.locate(name).meta.shape, float("nan"))
    for model in models:
        for part in model.weight_map.locate(name).placements:
            region = whole[tuple(slice(*bounds) for bounds in part.region)]
            assert (region.isnan() | (region == part.destination)).all()
            region.copy_(part.destination)
    return whole


@pytest.mark.parametrize(("family", "overrides", "size", "ep_size"), LAYOUTS)
@pytest.mark.parametrize("loader", [DefaultModelLoader(), DummyModelLoader(LoadConfig(seed=3))])
def test_every_layout_holds_the_same_model(
    family, overrides, size, ep_size, loader, tiny_checkpoint
):
    folder = tiny_checkpoint(family, **overrides)
    config = ModelConfig.from_folder(folder)
    single, parts = build_model(config, torch.float32, "cpu"), ranks(config, size, ep_size)
    for model in (single, *parts):
        loader.load_model(model, folder)
    metas = single.weight_map.metas()
    assert all(model.weight_map.metas() == metas for model in parts)
    assert joint_problems(metas, [Holdings.of(model.weight_map) for model in parts]) == []
    for meta in metas:
        assert torch.equal(assemble(parts, meta.name), single.weight_map.read(meta.name)), meta.name


def test_sizes_that_do_not_divide_are_refused_with_what_to_do(tiny_checkpoint):
    config = ModelConfig.from_folder(tiny_checkpoint("llama"))
    with pytest.raises(ConfigError, match=r"num_attention_heads.*got 4 over 3 ranks.*tp_size"):
        ranks(config, 3)


def test_the_group_of_one_is_the_identity():
    tensor = torch.ones(2)
    assert SingleGroup().all_reduce(tensor) is tensor
    assert SingleGroup().all_gather(tensor, 0) is tensor
