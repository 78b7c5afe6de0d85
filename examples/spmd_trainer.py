"""Two FSDP2 ranks publish their shards into an engine of two tensor-parallel ranks; nothing is gathered.

    python examples/spmd_trainer.py CHECKPOINT

CHECKPOINT is a Hugging Face folder; `rollout tiny FOLDER` makes one. `torchrun` works as well:
the script starts its second rank itself only because that makes it one command.
"""

import argparse
import subprocess
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from rollout import Engine
from weight_sync import SpmdPublisher, fingerprint

NUM_RANKS = 2


def train(path: str, rank: int, store: str, engine: Engine | None) -> None:
    """One rank of the trainer; rank 0 has the engine."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, NUM_RANKS),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("fsdp",))
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)

    with SpmdPublisher(mesh) as publisher:
        for step in range(1, 4):
            with torch.no_grad():  # stands for an optimiser step
                for parameter in policy.parameters():
                    parameter.mul_(0.999)
            report = publisher.publish(policy, engine, label=f"step {step}")
            print(f"rank {rank}: {report.message}", flush=True)
        expected = fingerprint(policy)  # of the whole model; every rank calls it
        if engine is not None:
            assert engine.weights_fingerprint() == expected
            print("the engine serves the trainer's weights, bit for bit")
        dist.barrier()  # nobody closes before all have their report
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--store")
    arguments = parser.parse_args()
    if arguments.rank:
        train(arguments.checkpoint, arguments.rank, arguments.store, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        command = [sys.executable, __file__, arguments.checkpoint, "--rank", "1", "--store", store]
        other = subprocess.Popen(command)
        try:
            with Engine(
                arguments.checkpoint, dtype="float32", executor="local", tp_size=2
            ) as engine:
                train(arguments.checkpoint, 0, store, engine)
            assert other.wait(60) == 0
        finally:
            other.kill()


if __name__ == "__main__":
    main()
