"""Ranks that see a trainer's arena on a GPU stage the parts that they keep, and check them together.

Two ranks of one process over memory files, which stand in for the memory of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ipc_stand_in import MemoryFiles, stand_in
from rank_support import NUM_RANKS, Meeting, ThreadAgreement
from sync_support import ToyHost, eventually

import weight_sync
from rollout.models.build import build_model
from rollout.models.model_config import ModelConfig
from weight_sync import WeightPublisher
from weight_sync.errors import ERRORS, FingerprintMismatch, ProtocolError
from weight_sync.layout.manifest import Manifest
from weight_sync.layout.weight_map import WeightMap
from weight_sync.plan.plan import compile_plan
from weight_sync.publisher.update import Update
from weight_sync.receiver import service
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.receiver.ranked_service import RankedService
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.staging import opened_cuda_ipc
from weight_sync.staging.parts_stage import PartsStage
from weight_sync.staging.shadow_stage import StageMemory
from weight_sync.wire.channel import RpcChannel
from weight_sync.wire.messages import WeightReply, WeightRequest
from weight_sync.wire.rpc import RpcClient, RpcServer

MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 48}
LAYOUTS = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 1),
    "a padded vocabulary": ("llama", {"vocab_size": 289}, 1),
    "tied and padded": (
        "qwen3",
        {"head_dim": 32, "tie_word_embeddings": True, "vocab_size": 290},
        1,
    ),
    "experts of every rank": ("qwen3_moe", {**MOE, "num_experts": 8}, 1),
    "experts of its own": (
        "qwen2_moe",
        {**MOE, "num_experts": 8, "shared_expert_intermediate_size": 64},
        2,
    ),
    "experts of its own, and biases": (
        "glm4_moe",
        {**MOE, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "head_dim": 16},
        2,
    ),
}


@pytest.fixture(params=list(LAYOUTS))
def maps(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> list[WeightMap]:
    """Of both ranks."""
    family, overrides, ep_size = LAYOUTS[request.param]
    config = ModelConfig.from_folder(tiny_checkpoint(family, **overrides))
    groups: list[Any] = [SimpleNamespace(rank=rank, size=NUM_RANKS) for rank in range(NUM_RANKS)]
    return [
        build_model(config, torch.float32, "cpu", group, ep_size).weight_map for group in groups
    ]


class Engine:
    """Both ranks, behind one socket."""

    def __init__(self, maps: list[WeightMap]) -> None:
        meeting = Meeting()
        self.maps = maps
        self.hosts = [ToyHost(weight_map) for weight_map in maps]
        for host in self.hosts:
            host.looks = False  # values of a model differ
        self.receivers = [
            WeightReceiver(weight_map, host, agreement=ThreadAgreement(rank, meeting))
            for rank, (weight_map, host) in enumerate(zip(maps, self.hosts, strict=True))
        ]
        self.services = [WeightService(receiver) for receiver in self.receivers]
        self.front = RankedService([LocalChannel(service) for service in self.services])
        self.server = RpcServer(self.front.handle, WeightRequest)
        self.server.start()

    def weight_channel(self) -> Any:
        return RpcChannel(RpcClient(self.server.address, WeightReply, errors=ERRORS), owned=True)

    @property
    def raw(self) -> list[torch.Tensor]:
        return [
            parameter.detach().clone()
            for weight_map in self.maps
            for parameter in weight_map.parameters.values()
        ]

    def close(self) -> None:
        self.server.close()
        self.front.close()
        for rank, host in zip(self.services, self.hosts, strict=True):
            rank.close()
            host.close()


@pytest.fixture
def engine(maps: list[WeightMap], monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    stand_in(monkeypatch)
    monkeypatch.setattr(service, "ipc_memory_of", lambda device: MemoryFiles())
    # The trainer is in this process too.
    monkeypatch.setattr(opened_cuda_ipc, "_check_owner", lambda handle: None)
    engine = Engine(maps)
    yield engine
    engine.close()


def tensors_of(engine: Engine, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        meta.name: torch.randn(meta.shape, generator=generator) for meta in engine.maps[0].metas()
    }


@pytest.mark.parametrize("arena_bytes", [None, 1 << 18])
def test_all_ranks_come_to_the_trainers_version(engine: Engine, arena_bytes: int | None) -> None:
    with WeightPublisher(engine, transport="cuda_ipc", arena_bytes=arena_bytes) as publisher:
        for seed in (1, 2, 3):
            tensors = tensors_of(engine, seed)
            report = publisher.publish(tensors)
            assert report.fingerprint == weight_sync.fingerprint(tensors) == publisher.fingerprint()
        part = {name: tensors[name] * 2 for name in list(tensors)[3:6]}
        publisher.publish(part, strict=False)
        assert publisher.fingerprint() == weight_sync.fingerprint(tensors | part)
    assert all(receiver.stage_memory.num_bytes == 0 for receiver in engine.receivers)


@pytest.mark.parametrize("arena_bytes", [None, 1 << 18])
def test_a_wrong_byte_is_found_by_all_ranks_before_any_of_them_writes(
    engine: Engine, arena_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WeightPublisher(engine, transport="cuda_ipc", arena_bytes=arena_bytes) as publisher:
        good = tensors_of(engine, 1)
        publisher.publish(good)
        before = engine.raw
        submit = Update._submit_bucket

        def damaged(update: Update, packed: Any, deadline: Any) -> None:
            first = update.packed.layout.carried.offsets[int(packed.indices[0])]
            update.packed.buffer[first if packed.at is None else packed.at] ^= 1
            submit(update, packed, deadline)

        with monkeypatch.context() as patch:
            patch.setattr(Update, "_submit_bucket", damaged)
            with pytest.raises(FingerprintMismatch, match="staged bytes of"):
                publisher.publish(tensors_of(engine, 2))
        for receiver in engine.receivers:
            assert eventually(lambda receiver=receiver: not receiver.updating)
            assert receiver.torn is None and receiver.version == 1
        assert all(map(torch.equal, engine.raw, before))
        publisher.publish(tensors_of(engine, 3))
        assert publisher.fingerprint() == weight_sync.fingerprint(tensors_of(engine, 3))


def test_a_rank_reads_what_it_keeps_and_nothing_else(maps: list[WeightMap]) -> None:
    """What other ranks keep may be anything: nothing here depends on it. And nothing is read twice."""
    weight_map = maps[1]
    manifest = Manifest(tensors=weight_map.metas(), bucket_bytes=1 << 20)
    plan = compile_plan(manifest, weight_map)
    arena = torch.randn(manifest.arena_bytes // 4).view(torch.uint8)
    masked = torch.full_like(arena, 0xFF)
    for i, meta in enumerate(manifest.tensors):
        kept = weight_map.locate(meta.name).mask()
        manifest.view(masked, i)[kept] = manifest.view(arena, i)[kept]
    found = []
    memory = StageMemory(weight_map, torch.device("cpu"))
    memory.hold()
    rows = np.arange(len(manifest.tensors), dtype=np.uint32)
    for buffer in (arena, masked):
        stage = PartsStage(memory, buffer, plan, is_window=False)
        for some in np.array_split(np.random.default_rng(0).permutation(rows), 3):
            stage.accept(some, lambda *_: pytest.fail("no whole tensor is there to check"), 5.0)
        stage.write(None)
        kept_bytes = [p.detach().clone() for p in weight_map.parameters.values()]
        found.append((kept_bytes, stage.summands(None)))
        stage.release()
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert (found[0][1] == found[1][1]).all()
    assert sum(copy.destination.nbytes for copy in plan.copies) < 0.8 * manifest.arena_bytes


def test_buckets_that_are_not_where_they_can_be_are_refused(maps: list[WeightMap]) -> None:
    manifest = Manifest(tensors=maps[0].metas(), bucket_bytes=1 << 20)
    plan = compile_plan(manifest, maps[0])
    memory = StageMemory(maps[0], torch.device("cpu"))
    memory.hold()
    window = torch.zeros(1024, dtype=torch.uint8)
    rows = np.arange(3, dtype=np.uint32)
    stage = PartsStage(memory, window, plan, is_window=True)
    for wrong, at in ((rows, None), (rows[::-1], 0), (rows, 1 << 20)):
        with pytest.raises(ProtocolError):
            stage.accept(wrong, lambda *_: None, 5.0, at)
    whole = torch.zeros(manifest.arena_bytes, dtype=torch.uint8)
    with pytest.raises(ProtocolError, match="expected None"):
        PartsStage(memory, whole, plan, is_window=False).accept(rows, lambda *_: None, 5.0, 0)
