"""Trainer and engine share one machine's memory: the engine gives its own back while the trainer works.

    python examples/colocated.py CHECKPOINT

The sequence that colocated RL trainers follow: release, train, resume the weights, push them, resume the KV cache.
Requests that were running wait, and go on with the new version.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM

from rollout import Engine
from weight_sync import WeightPublisher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    path = parser.parse_args().checkpoint

    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with (
        Engine(path, dtype="float32", executor="local") as engine,
        WeightPublisher(engine) as publisher,
        ThreadPoolExecutor() as background,
    ):
        params = {"max_new_tokens": 48, "ignore_eos": True, "n": 4}
        running = background.submit(engine.generate, input_ids=[3, 4, 5], sampling_params=params)

        # Pause first: weights that are released end the requests that still need them.
        engine.pause_generation("retract")
        released = engine.release_memory_occupation(["kv_cache"])
        print(f"released {released.num_bytes / 1e6:.1f} MB of KV cache")

        with torch.no_grad():  # stands for the training phase
            for parameter in policy.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))

        print(publisher.publish(policy, label="step 1").message)
        engine.resume_memory_occupation(["kv_cache"])
        engine.continue_generation()
        for result in running.result():
            print(result["meta_info"]["weight_versions"])


if __name__ == "__main__":
    main()
