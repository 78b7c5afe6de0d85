"""A trainer pushes new weights into an engine that runs in another process, while a request is running there.

    python examples/push_weights.py CHECKPOINT

CHECKPOINT is a Hugging Face folder; `rollout tiny FOLDER` makes one.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM

from rollout import Engine
from weight_sync import WeightPublisher, fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    path = parser.parse_args().checkpoint

    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with (
        Engine(path, dtype="float32", executor="local") as engine,
        WeightPublisher(engine) as publisher,
    ):
        request = {
            "input_ids": [3, 4, 5],
            "sampling_params": {"max_new_tokens": 48, "ignore_eos": True, "n": 4},
        }
        with ThreadPoolExecutor() as background:
            running = background.submit(engine.generate, **request)
            for step in range(1, 4):
                with torch.no_grad():  # stands for an optimiser step
                    for parameter in policy.parameters():
                        parameter.add_(1e-3 * torch.randn_like(parameter))
                print(publisher.publish(policy, label=f"step {step}").message)
            results = running.result()

        for result in results:
            print(result["meta_info"]["weight_versions"])
        assert engine.weights_fingerprint() == fingerprint(policy)
        print("the engine serves the trainer's weights, bit for bit")


if __name__ == "__main__":
    main()
