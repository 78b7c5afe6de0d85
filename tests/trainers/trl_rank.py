"""One of two ranks of a TRL trainer: python trl_rank.py CHECKPOINT FOLDER shared|own."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from trl_support import DIFFERENCE, NUM_DIGITS, data, logged, make_trainer, poison

from rollout import Engine
from trainers_integration.demo.data import make_dataset
from trainers_integration.trl import attach
from weight_sync import fingerprint


def shard(trainer: Any) -> None:
    """As FSDP2 does it; accelerate, which would do it for the trainer, does so on GPUs alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from trl.distributed import DistributedBackend

    mesh = init_device_mesh("cpu", (2,))
    for layer in trainer.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trainer.model, mesh=mesh)
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
    trainer._dist = DistributedBackend(trainer.accelerator)
    assert trainer._dist.is_fsdp


def refused(trainer: Any, generation: Any) -> str:
    """The error of a sync for which rank 0 has something that is no number."""
    first = next(trainer.model.parameters())
    kept = first.detach().clone()
    if trainer.accelerator.is_main_process:
        with torch.no_grad():
            first.fill_(float("nan"))
    try:
        generation.sync_weights()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        with torch.no_grad():
            first.copy_(kept)
    return ""


def main() -> None:
    checkpoint, folder, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    # The ranks meet at a file: no port that another process might have taken meanwhile.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = Engine(checkpoint, seed=rank) if rank == 0 or mode == "own" else None
    if own is not None:
        poison(own)
    examples = make_dataset(num_train=512, num_heldout=32, num_digits=NUM_DIGITS, seed=0)
    args = {"per_device_train_batch_size": 4, "num_generations": 8}
    trainer = make_trainer("GRPO", checkpoint, data(examples), args=args)
    generation = attach(trainer, own)
    trainer.train()
    engine = generation.engine
    said: dict[str, Any] = {
        "publishes": generation.publishes,
        "label": engine.weight_version,
        "differences": logged(trainer, DIFFERENCE),
    }
    generation.sync_weights()
    said["expected"] = fingerprint(trainer.model)
    said["served"] = engine.weights_fingerprint()
    if mode == "shared":
        said["error"] = refused(trainer, generation)
        said["served_after_error"] = engine.weights_fingerprint()
        dist.barrier()  # both have looked
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.01)
        said["expected_from_shards"] = fingerprint(trainer.model)
        shard(trainer)
        generation.sync_weights()
        said["served_from_shards"] = engine.weights_fingerprint()
    dist.barrier()
    generation.close()
    if own is not None:
        own.shutdown()
    print(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
