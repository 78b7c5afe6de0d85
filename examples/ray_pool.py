"""Two replicas behind one `generate`: an update reaches both, and the work of one that is killed is done by the other.

    python examples/ray_pool.py CHECKPOINT                      Ray actors; RAY_ADDRESS names a running cluster
    python examples/ray_pool.py CHECKPOINT --executor local     child processes, without Ray

CHECKPOINT is a Hugging Face folder; `rollout tiny FOLDER` makes one.
"""

import argparse
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM

from rollout import RolloutPool
from weight_sync import fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--executor", choices=["ray", "local"], default="ray")
    arguments = parser.parse_args()
    path = arguments.checkpoint

    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with (
        RolloutPool(
            path,
            num_replicas=2,
            executor=arguments.executor,
            dtype="float32",
            kv_cache_bytes=16 << 20,
        ) as pool,
        ThreadPoolExecutor() as background,
    ):
        with torch.no_grad():  # stands for an optimiser step
            for parameter in policy.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        print(pool.publish(policy, label="step 1").message)

        prompts = [[3, 4, 5 + i % 4, 5 + i // 4] for i in range(16)]
        params = {"max_new_tokens": 48, "ignore_eos": True, "n": 4}
        running = background.submit(pool.generate, input_ids=prompts, sampling_params=params)
        victim = busiest(pool)
        os.kill(victim.pids[0], signal.SIGKILL)
        results = running.result()
        again = sum(result["meta_info"]["num_reruns"] for result in results)
        print(
            f"{len(results)} samples; {again} of them ran again, because replica {victim.number} was killed"
        )

        while [replica.state for replica in pool.replicas()] != ["serving"] * 2:
            time.sleep(0.1)
        assert pool.weights_fingerprint() == fingerprint(policy)
        numbers = [replica.number for replica in pool.replicas()]
        print(f"replicas {numbers} serve the trainer's weights, bit for bit")


def busiest(pool: RolloutPool):
    """The replica with the most samples, once there is one that has any."""
    while True:
        replica = max(pool.replicas(), key=lambda replica: replica.num_inflight)
        if replica.num_inflight:
            return replica


if __name__ == "__main__":
    main()
