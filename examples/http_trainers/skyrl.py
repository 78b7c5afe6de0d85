"""One step of SkyRL's requests: sizes, generate, freeze, publish, thaw, and what it asks of caches and memory.

    rollout serve --model CHECKPOINT --port 8000 --set engine.listen=tcp://127.0.0.1:5555
    python examples/http_trainers/skyrl.py http://127.0.0.1:8000 NEW_CHECKPOINT --address ADDRESS

Written after SkyRL 0.4.0: `inference_servers/remote_inference_client.py` and `worker_dispatch.py`. `make test-clients`
runs SkyRL's own `RemoteInferenceClient`. The weights go the way of `trainers_integration.skyrl`, not over HTTP.
"""

from __future__ import annotations

import argparse
from typing import Any

import httpx
from trainer_side import Tensors, load

from trainers_integration.skyrl import PublishingTrainerEngine


class SkyRL:
    """What SkyRL's client and its worker dispatch send; one server is data plane and control plane."""

    def __init__(self, url: str, addresses: list[str], model: str = "default") -> None:
        self._http = httpx.Client(base_url=url, timeout=60.0, trust_env=False)
        self._addresses = addresses
        self._model = model
        self._engine: PublishingTrainerEngine | None = None
        self.version = 0

    def world_size(self) -> int:
        """Ranks of the server, asked once before training."""
        size: int = self._http.get("/get_world_size").raise_for_status().json()["world_size"]
        return size

    def generate(self, token_ids: list[int], session: str, **params: Any) -> dict[str, Any]:
        """One sample, its text from `/detokenize`. The salt keeps prefixes of older policies apart."""
        body = {
            "sampling_params": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "logprobs": 1,
                "skip_special_tokens": True,
                "include_stop_str_in_output": True,
                **params,
            },
            "model": self._model,
            "token_ids": token_ids,
            "cache_salt": f"policy:{self.version}",
        }
        headers = {"X-Session-ID": session}
        choice = self._post("/inference/v1/generate", body, headers=headers)["choices"][0]
        text = self._post("/detokenize", {"model": self._model, "tokens": choice["token_ids"]})
        return {
            "tokens": choice["token_ids"],
            "logprobs": [entry["logprob"] for entry in choice["logprobs"]["content"]],
            "finish": choice["finish_reason"],
            "text": text["prompt"],
        }

    def sample(self, token_ids: list[int], num_samples: int, max_tokens: int) -> dict[str, Any]:
        """Tinker's `sample`: several samples of a prompt, with the prompt's log-probabilities."""
        params = {"n": num_samples, "logprobs": 0, "output_kind": 2, "prompt_logprobs": 0}
        body = {
            "sampling_params": {**params, "max_tokens": max_tokens, "temperature": 1.0},
            "model": self._model,
            "token_ids": token_ids,
        }
        answer = self._post("/inference/v1/generate", body)
        rows = answer["prompt_logprobs"]
        return {
            "samples": [choice["token_ids"] for choice in answer["choices"]],
            "prompt_logprobs": [
                None if row is None else row[str(token)]["logprob"]
                for token, row in zip(token_ids, rows, strict=True)
            ],
        }

    def sync_weights(self, tensors: Tensors) -> None:
        """Freeze requests where they are, publish, thaw: they finish with the new weights."""
        if self._engine is None:
            self._engine = PublishingTrainerEngine(self._addresses, is_sender=True)
        self._engine.source = list(tensors.items())
        self._post("/pause?mode=keep&clear_cache=false")
        try:
            self._engine.send_weights()
        finally:
            self._post("/resume")
        self.version += 1

    def reset_prefix_cache(self, *, running: bool) -> None:
        """With `running`, frozen and running requests compute their prompts again."""
        self._post("/reset_prefix_cache", {"reset_running_requests": running})

    def sleep(self, level: int) -> bool:
        """Give memory back; whether the server says that it sleeps."""
        self._post(f"/sleep?level={level}")
        found: bool = self._http.get("/is_sleeping").raise_for_status().json()["is_sleeping"]
        return found

    def wake_up(self, *tags: str) -> None:
        """Take memory of these tags again."""
        self._post("/wake_up?" + "&".join(f"tags={tag}" for tag in tags))

    def close(self) -> None:
        """Let go of the engines."""
        if self._engine is not None:
            self._engine.shutdown()

    def _post(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> Any:
        answer = self._http.post(path, json=body, **options)
        if answer.is_error:
            raise RuntimeError(f"{path}: {answer.text}")
        return answer.json()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("checkpoint")
    parser.add_argument("--address", action="append", required=True, help="of the engine")
    given = parser.parse_args()
    trainer = SkyRL(given.url, given.address)
    print(f"ranks: {trainer.world_size()}")
    print(f"before: {trainer.generate([1, 2, 3], 'one', max_tokens=8)}")
    trainer.sync_weights(load(given.checkpoint))
    print(f"after: {trainer.generate([1, 2, 3], 'two', max_tokens=8)}")
    trainer.close()


if __name__ == "__main__":
    main()
