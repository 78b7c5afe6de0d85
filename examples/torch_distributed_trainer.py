"""A trainer that knows only torch.distributed pushes weights into two tensor-parallel ranks over a group.

    python examples/torch_distributed_trainer.py CHECKPOINT

The trainer is rank 0 of a group of three, with a store of its own beside any default process group. For each tensor it
tells the engine name, dtype and shape, without waiting, and broadcasts. A session makes all of it one version.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rollout import Engine
from weight_sync import fingerprint

GROUP = "weights"
TENSORS_PER_CALL = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    path = parser.parse_args().checkpoint

    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with (
        Engine(path, dtype="float32", executor="local", tp_size=2) as engine,
        ThreadPoolExecutor() as background,
    ):
        # On another machine: an address that the engine can reach.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        joining = background.submit(
            engine.init_weights_update_group, "127.0.0.1", store.port, 1, 3, GROUP, "gloo"
        )
        timeout = timedelta(seconds=60)
        group = dist.ProcessGroupGloo(dist.PrefixStore(GROUP, store), 0, 3, timeout)
        joining.result()

        with torch.no_grad():  # stands for an optimiser step
            for parameter in policy.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))

        named = list(policy.named_parameters())
        engine.begin_weight_update(weight_version="step 1", strict=True)
        for first in range(0, len(named), TENSORS_PER_CALL):
            part = named[first : first + TENSORS_PER_CALL]
            staged = background.submit(
                engine.update_weights_from_distributed,
                [name for name, _ in part],
                [tensor.dtype for _, tensor in part],
                [tensor.shape for _, tensor in part],
                GROUP,
            )
            for _, tensor in part:
                group.broadcast(tensor.detach().contiguous(), 0).wait()
            staged.result()
        print(engine.end_weight_update().message)

        engine.destroy_weights_update_group(GROUP)
        assert engine.weights_fingerprint() == fingerprint(policy)
        print("both ranks serve the trainer's weights, bit for bit")


if __name__ == "__main__":
    main()
