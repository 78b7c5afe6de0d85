"""An engine as a Ray actor: many calls at once, weights pushed to its address by whoever trains.

    python examples/ray_actor.py CHECKPOINT                     RAY_ADDRESS names a running cluster

CHECKPOINT is a Hugging Face folder; `rollout tiny FOLDER` makes one.
"""

import argparse

import ray
import torch
from transformers import AutoModelForCausalLM

from rollout import RolloutActor
from weight_sync import WeightPublisher, fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    path = parser.parse_args().checkpoint

    ray.init()
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    actor = RolloutActor.options(num_cpus=1).remote(path, dtype="float32", kv_cache_bytes=16 << 20)
    with WeightPublisher(ray.get(actor.address.remote())) as publisher:
        params = {"max_new_tokens": 48, "ignore_eos": True, "n": 4}
        running = [
            actor.generate.remote(input_ids=[3, 4, token], sampling_params=params)
            for token in range(5, 9)
        ]
        with torch.no_grad():  # stands for an optimiser step
            for parameter in policy.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        print(publisher.publish(policy, label="step 1").message)
        results = [sample for samples in ray.get(running) for sample in samples]
        print(f"{len(results)} samples from {len(running)} calls at once")
        for chunk in actor.generate_stream.remote(
            input_ids=[3, 4, 5], sampling_params={"max_new_tokens": 4}
        ):
            print(ray.get(chunk)["output_ids"])
        assert ray.get(actor.weights_fingerprint.remote()) == fingerprint(policy)
        print("the actor serves the trainer's weights, bit for bit")


if __name__ == "__main__":
    main()
