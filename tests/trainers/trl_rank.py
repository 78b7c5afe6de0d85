"""One of two ranks of a TRL trainer: python trl_rank.py CHECKPOINT FOLDER shared|own|fsdp2|zero3|zero3-adapters."""

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
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


def shard_with_zero3() -> None:
    """As `accelerate launch --use_deepspeed --zero_stage 3` sets them, and that deepspeed is to compute on a CPU."""
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "DS_ACCELERATOR": "cpu",
    }


def whole(parameters: list[torch.nn.Parameter], mode: str) -> AbstractContextManager[Any]:
    """While it is entered, parameters of ZeRO-3 hold all that they are."""
    if not mode.startswith("zero3"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return gathered


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of it."""
    if hasattr(parameter, "ds_tensor"):  # of ZeRO-3
        return parameter.ds_tensor
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
    if mode.startswith("zero3"):
        shard_with_zero3()
    rank = int(os.environ["RANK"])
    # The ranks meet at a file: no port that another process might have taken meanwhile.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = Engine(checkpoint, seed=rank) if rank == 0 or mode == "own" else None
    if own is not None:
        poison(own)
    examples = make_dataset(num_train=512, num_heldout=32, num_digits=NUM_DIGITS, seed=0)
    args: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 8}
    options: dict[str, Any] = {}
    if mode.startswith("zero3"):
        # accelerate gives deepspeed its ranks where no CPU is asked for, and a CPU a backend where one is named.
        args |= {"use_cpu": False, "ddp_backend": "gloo"}
    if mode == "zero3-adapters":
        args["learning_rate"] = 0.02
        options["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0
        )
    trainer = make_trainer("GRPO", checkpoint, data(examples), args=args, **options)
    generation = attach(trainer, own)
    trainer.train()
    engine = generation.engine
    parameters = list(trainer.model.parameters())
    said: dict[str, Any] = {
        "publishes": generation.publishes,
        "label": engine.weight_version,
        "differences": logged(trainer, DIFFERENCE),
        "is_sharded": all(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in parameters),
        "held": sum(local(p).numel() for p in parameters),
    }
    generation.sync_weights()
    with whole(parameters, mode):
        said["all"] = sum(p.numel() for p in parameters)
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
