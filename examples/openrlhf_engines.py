"""Steps of training against two engines as OpenRLHF's trainer drives them: its calls in its order, over Ray and gloo.

    python examples/openrlhf_engines.py CHECKPOINT [--engines 2] [--steps 3]        RAY_ADDRESS names a running cluster

CHECKPOINT is a Hugging Face folder; `rollout demo` leaves one in runs/demo-sync/checkpoint-start. The calls are those
of OpenRLHF's main branch of 2026: `trainer/ray/ppo_actor.py` (the group, `broadcast_to_vllm`) and
`trainer/ppo_utils/samples_generator.py`. OpenRLHF itself needs vLLM, DeepSpeed and a GPU, and is not needed here.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import ray
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers_integration.openrlhf.engines import create_engines

PROMPTS = ["31425=", "99817=", "50523=", "7640="]
SAMPLES = 4
MAX_LENGTH = 14
SAMPLING = SimpleNamespace(  # vLLM's SamplingParams as OpenRLHF fills them in
    temperature=1.0,
    top_p=1.0,
    top_k=-1,
    max_tokens=None,
    min_tokens=1,
    skip_special_tokens=False,
    logprobs=1,
)


class Trainer:
    """Rank 0 of OpenRLHF's actors."""

    def __init__(self, path: str, engines: list[Any]) -> None:
        self.engines = engines
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.group = self._meet()

    def _meet(self) -> Any:
        """The group of rank 0 and all engines, with a store of its own."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        size, name = len(self.engines) + 1, "openrlhf"
        joining = [
            engine.init_process_group.remote(
                "127.0.0.1", store.port, rank, size, name, backend="gloo", use_ray=False
            )
            for rank, engine in enumerate(self.engines, start=1)
        ]
        prefixed = dist.PrefixStore(name, store)
        group = dist.ProcessGroupGloo(prefixed, 0, size, timedelta(minutes=5))
        ray.get(joining)
        return group

    def samples(self) -> list[dict[str, Any]]:
        """Every prompt goes to the engine with the least to do."""
        asked = [engine.get_num_unfinished_requests.remote() for engine in self.engines]
        pending = ray.get(asked)
        running = []
        for prompt in PROMPTS:
            place = pending.index(min(pending))
            pending[place] += SAMPLES
            running.append(
                self.engines[place].generate_responses.remote(
                    prompt=prompt,
                    label=prompt,
                    sampling_params=SAMPLING,
                    max_length=MAX_LENGTH,
                    hf_tokenizer=self.tokenizer,
                    num_samples=SAMPLES,
                    images=None,
                )
            )
        return [response for responses in ray.get(running) for response in responses]

    def logprobs(self, response: dict[str, Any]) -> torch.Tensor:
        """The policy's log-probabilities of a response's actions."""
        ids = torch.tensor([response["observation_tokens"]])
        ((start, end),) = response["action_ranges"]
        table = torch.log_softmax(self.model(ids).logits[0].float(), dim=-1)
        return table[start - 1 : end - 1].gather(1, ids[0, start:end, None])[:, 0]

    def learn(self, responses: list[dict[str, Any]]) -> tuple[float, float]:
        """A policy-gradient step: (how far the engines were from the policy, how far the step has moved it), nats."""
        rewards = torch.tensor([reward(each) for each in responses])
        groups = rewards.view(-1, SAMPLES)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten()
        current = [self.logprobs(each) for each in responses]
        gap = max(
            float((row.detach() - drawn(each)).abs().max())
            for row, each in zip(current, responses, strict=True)
        )
        loss = -torch.stack([row.mean() for row in current]) @ advantages
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            moved = max(
                float((self.logprobs(each) - row).abs().max())
                for row, each in zip(current, responses, strict=True)
            )
        return gap, moved

    @torch.no_grad()
    def broadcast_to_engines(self) -> None:
        """Each tensor is announced to all engines, then broadcast; the last one says so by `empty_cache`."""
        ray.get([engine.reset_prefix_cache.remote() for engine in self.engines])
        parameters = list(self.model.named_parameters())
        for count, (name, parameter) in enumerate(parameters, start=1):
            announced = [
                engine.update_weight.remote(
                    name,
                    dtype=parameter.dtype,
                    shape=parameter.shape,
                    empty_cache=count == len(parameters),
                )
                for engine in self.engines
            ]
            self.group.broadcast(parameter.data.contiguous(), 0).wait()
            ray.get(announced)


def drawn(response: dict[str, Any]) -> torch.Tensor:
    """The engine's log-probabilities of a response's actions."""
    ((start, end),) = response["action_ranges"]
    return torch.tensor(response["rollout_log_probs"][start:end])


def reward(response: dict[str, Any]) -> float:
    """Share of actions that are even token ids: anything that differs between samples."""
    ((start, end),) = response["action_ranges"]
    actions = response["observation_tokens"][start:end]
    return sum(token % 2 == 0 for token in actions) / len(actions)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    ray.init()
    engines = create_engines(
        given.engines,
        given.checkpoint,
        seed=42,
        ray_options={"num_cpus": 1},
        dtype="float32",
        kv_cache_bytes=16 << 20,
        num_threads=1,
    )
    trainer = Trainer(given.checkpoint, engines)
    try:
        for step in range(1, given.steps + 1):
            responses = trainer.samples()
            gap, moved = trainer.learn(responses)
            trainer.broadcast_to_engines()
            print(
                f"step {step}: {len(responses)} samples, policy and engines differ by at most {gap:.1e}, "
                f"the step moved it by {moved:.1e}",
                flush=True,
            )
    finally:
        ray.get([engine.shutdown.remote() for engine in engines])


if __name__ == "__main__":
    main()
