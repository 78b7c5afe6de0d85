"""One of two ranks of a TRL trainer: python trl_rank.py CHECKPOINT FOLDER shared|own|fsdp2."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from trl_support import DIFFERENCE, NUM_DIGITS, data, logged, make_trainer, poison

from rollout import Engine
from trainers_integration.demo.data import make_dataset
from trainers_integration.trl import attach
from weight_sync import fingerprint


def allow_fsdp_on_a_cpu() -> None:
    """accelerate shards on GPUs alone; here it is told to on a CPU, and what it does then is its own and torch's."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        if named.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = named["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded
    # As `accelerate launch` with a configuration of FSDP2 sets them.
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


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
    if mode == "fsdp2":
        allow_fsdp_on_a_cpu()
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
        "is_sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "held": sum(local(p).numel() for p in trainer.model.parameters()),
        "all": sum(p.numel() for p in trainer.model.parameters()),
    }
    generation.sync_weights()
    said["expected"] = fingerprint(trainer.model)
    said["served"] = engine.weights_fingerprint()
    if mode == "shared":
        said["error"] = refused(trainer, generation)
        said["served_after_error"] = engine.weights_fingerprint()
        dist.barrier()  # both have looked
    dist.barrier()
    generation.close()
    if own is not None:
        own.shutdown()
    print(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
