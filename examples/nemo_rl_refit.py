"""GRPO steps with NeMo-RL's checkpoint engine and generation interface: two FSDP2 policy ranks, an engine, no NeMo-RL.

    python examples/nemo_rl_refit.py CHECKPOINT [--steps 3]

CHECKPOINT is a Hugging Face folder; `rollout demo` leaves one in runs/demo-sync/checkpoint-start. What NeMo-RL has of
its own is written after its main branch of 2026: `models/policy/workers/checkpoint_engine.py` (`PolicyWorker`),
`weight_sync/checkpoint_engine_weight_synchronizer.py` (`refit`) and `models/generation/interfaces.py` (`Generation`).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from rollout import Engine
from weight_sync import fingerprint

NUM_RANKS = 2
TRANSPORT = "trainers_integration.nemo_rl:PublishingCheckpointEngine"
PROMPTS = [[3, 7, 5, 2], [9, 4, 8, 2], [6, 6, 11, 2], [10, 3, 2]]
SAMPLES = 4


class PolicyWorker:
    """What a policy worker of NeMo-RL does with a checkpoint engine, one call for each phase of a refit."""

    def __init__(self, model: Any, rank: int) -> None:
        self.model, self.rank = model, rank
        self.checkpoint_engine: Any = None

    def checkpoint_engine_rpc(self, method: str, **given: Any) -> Any:
        """As its synchronizer calls it, on all workers at once."""
        if method == "init_checkpoint_engine":
            if self.checkpoint_engine is None:
                module, name = given["backend"].split(":", 1)
                kind = getattr(importlib.import_module(module), name)
                self.checkpoint_engine = kind(
                    bucket_size=given["bucket_size_bytes"], **given["engine_kwargs"]
                )
            return None
        if method == "prepare_checkpoint_engine":
            return {**self.checkpoint_engine.prepare(), "rank": self.rank}
        if method == "init_checkpoint_engine_process_group":
            return self.checkpoint_engine.init_policy_process_group(worker_rank=self.rank, **given)
        if method == "send_weights_via_checkpoint_engine":
            return asyncio.run(self.checkpoint_engine.send_weights(self._weights()))
        return self.checkpoint_engine.finalize()

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors, one after the other; making each is a collective of all ranks."""
        for name, parameter in self.model.named_parameters():
            value = parameter.detach()
            yield name, value.full_tensor() if isinstance(value, DTensor) else value


def refit(worker: PolicyWorker, address: str) -> None:
    """One refit as the synchronizer orders it, where generation is none of NeMo-RL's workers."""
    worker.checkpoint_engine_rpc(
        "init_checkpoint_engine",
        backend=TRANSPORT,
        bucket_size_bytes=64 << 20,
        engine_kwargs={"addresses": [address], "release_after_refit": False},
    )
    own = worker.checkpoint_engine_rpc("prepare_checkpoint_engine")
    worker.checkpoint_engine_rpc(
        "init_checkpoint_engine_process_group",
        metadata=[{**own, "rank": rank} for rank in range(NUM_RANKS)],
        train_world_size=NUM_RANKS,
        rollout_world_size=0,
    )
    worker.checkpoint_engine_rpc("send_weights_via_checkpoint_engine")


class Generation:
    """`GenerationInterface` over an engine: token ids in, NeMo-RL's padded tensors out."""

    def __init__(self, engine: Engine, max_new_tokens: int) -> None:
        self.engine = engine
        self.max_new_tokens = max_new_tokens

    def generate(self, data: dict[str, torch.Tensor], greedy: bool) -> dict[str, torch.Tensor]:
        """`input_ids` (B, T), padded on the right, and `input_lengths` (B,); log-probabilities of prompts are 0."""
        rows = zip(data["input_ids"].tolist(), data["input_lengths"].tolist(), strict=True)
        prompts = [ids[:length] for ids, length in rows]
        results = self.engine.generate(
            input_ids=prompts,
            sampling_params={
                "max_new_tokens": self.max_new_tokens,
                "temperature": 0.0 if greedy else 1.0,
                "ignore_eos": True,
            },
            return_logprob=True,
        )
        width = data["input_ids"].shape[1] + self.max_new_tokens
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        logprobs = torch.zeros(len(prompts), width)
        lengths = torch.zeros(len(prompts), dtype=torch.int64)
        for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            start, output = len(prompt), result["output_ids"]
            lengths[row] = len(output)
            ids[row, : start + len(output)] = torch.tensor([*prompt, *output])
            entries = result["meta_info"]["output_token_logprobs"]
            logprobs[row, start : start + len(output)] = torch.tensor([e[0] for e in entries])
        return {
            "output_ids": ids,
            "generation_lengths": lengths,
            "unpadded_sequence_lengths": data["input_lengths"] + lengths,
            "logprobs": logprobs,
        }

    def prepare_for_generation(self, *_: Any, **__: Any) -> bool:
        return True

    def finish_generation(self, *_: Any, **__: Any) -> bool:
        return True


def batch() -> dict[str, torch.Tensor]:
    """Every prompt as often as it is sampled, neighbours together."""
    rows = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "input_lengths": torch.tensor([len(row) for row in rows]),
    }


def shared(found: dict[str, torch.Tensor] | None, max_new_tokens: int) -> dict[str, torch.Tensor]:
    """What rank 0 has generated, on all ranks."""
    data = batch()
    size = data["input_lengths"].shape[0]
    width = data["input_ids"].shape[1] + max_new_tokens
    if found is None:
        found = {
            "output_ids": torch.zeros(size, width, dtype=torch.int64),
            "generation_lengths": torch.zeros(size, dtype=torch.int64),
            "unpadded_sequence_lengths": torch.zeros(size, dtype=torch.int64),
            "logprobs": torch.zeros(size, width),
        }
    for value in found.values():
        dist.broadcast(value, 0)
    return found


def learn(model: Any, optimizer: Any, found: dict[str, torch.Tensor], rank: int) -> float:
    """A policy-gradient step on this rank's half; how far the policy was from the engine before it, of all ranks."""
    starts = found["unpadded_sequence_lengths"] - found["generation_lengths"]
    places = torch.arange(found["output_ids"].shape[1])
    mask = (places >= starts[:, None]) & (places < found["unpadded_sequence_lengths"][:, None])
    rewards = ((found["output_ids"] % 2 == 0) & mask).float().sum(1)
    groups = rewards.view(-1, SAMPLES)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    own = slice(rank * len(rewards) // NUM_RANKS, (rank + 1) * len(rewards) // NUM_RANKS)
    ids, mask = found["output_ids"][own], mask[own, 1:]
    table = torch.log_softmax(model(input_ids=ids[:, :-1]).logits.float(), dim=-1)
    current = table.gather(-1, ids[:, 1:, None])[..., 0]
    gap = (current - found["logprobs"][own, 1:]).abs().masked_fill(~mask, 0.0).max().detach()
    loss = -(current * mask * advantages[own, None]).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    dist.all_reduce(gap, dist.ReduceOp.MAX)
    return float(gap)


def train(path: str, rank: int, store: str, steps: int, address: str, engine: Any) -> None:
    """One rank of the policy; rank 0 has the engine."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, NUM_RANKS),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(minutes=5),
    )
    mesh = init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("dp",))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    worker = PolicyWorker(model, rank)
    generation = None if engine is None else Generation(engine, max_new_tokens=6)
    for step in range(1, steps + 1):
        refit(worker, address)  # so the engine needs no weights of its own
        found = None if generation is None else generation.generate(batch(), greedy=False)
        gap = learn(model, optimizer, shared(found, 6), rank)
        if rank == 0:
            print(
                f"step {step}: policy and engine differ by at most {gap:.1e}, "
                f"version {engine.status().version}",
                flush=True,
            )
    refit(worker, address)
    expected = fingerprint(model)  # every rank calls it
    if engine is not None:
        assert engine.weights_fingerprint() == expected
        print("the engine serves the policy's weights, bit for bit")
    worker.checkpoint_engine_rpc("finalize_checkpoint_engine")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0, help="the script starts the others itself")
    parser.add_argument("--store")
    parser.add_argument("--address")
    given = parser.parse_args()
    if given.rank:
        train(given.checkpoint, given.rank, given.store, given.steps, given.address, None)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(given.checkpoint, load_format="dummy", dtype="float32", executor="local") as engine,
    ):
        store = f"{folder}/store"
        words = [sys.executable, __file__, given.checkpoint, "--rank", "1", "--store", store]
        words += ["--address", engine.address, "--steps", str(given.steps)]
        other = subprocess.Popen(words)
        try:
            train(given.checkpoint, 0, store, given.steps, engine.address, engine)
            assert other.wait(300) == 0
        finally:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
