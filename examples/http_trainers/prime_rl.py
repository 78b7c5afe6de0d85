"""One step of prime-rl's requests: health, model, generate, freeze, a folder of new weights, thaw.

    rollout serve --model CHECKPOINT --port 8000
    python examples/http_trainers/prime_rl.py http://127.0.0.1:8000 NEW_CHECKPOINT

Written after prime-rl's main branch of 2026 (`src/prime_rl/utils/client.py`) and renderers 0.1.12, whose own client
`make test-clients` runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import httpx

READY = "NCCL_READY"
"""A file that its orchestrator leaves in the folder, whatever the transport."""


class PrimeRL:
    """What prime-rl's orchestrator (admin client) and its environments (renderers) send."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=60.0, trust_env=False)
        self.model = ""

    def wait_until_ready(self, model: str) -> int:
        """`/health`, and that the model is served; returns the length that its prompts may have."""
        self._http.get("/health").raise_for_status()
        cards = self._http.get("/v1/models").raise_for_status().json()["data"]
        for card in cards:
            if card["id"] == model:
                self.model = model
                length: int = card["max_model_len"]
                return length
        raise ValueError(f"got models {[card['id'] for card in cards]}, expected {model}")

    def generate(self, token_ids: list[int], session: str, **params: Any) -> dict[str, Any]:
        """One turn, rendered by the client (client type "renderer")."""
        body = {
            "model": self.model,
            "token_ids": token_ids,
            "sampling_params": {
                "temperature": 1.0,
                "stop_token_ids": [],
                "logprobs": 1,
                "skip_special_tokens": False,
                **params,
            },
        }
        headers = {"X-Session-ID": session}
        answer = self._post("/inference/v1/generate", json=body, headers=headers)
        choice = answer["choices"][0]
        content = choice["logprobs"]["content"]
        names = [entry["token"] for entry in content]
        if names != [f"token_id:{token}" for token in choice["token_ids"]]:
            raise ValueError(f"log-probabilities are of {names}, not of the tokens")
        return {
            "tokens": choice["token_ids"],
            "logprobs": [entry["logprob"] for entry in content],
            "finish": choice["finish_reason"],
        }

    def chat_with_tokens(self, token_ids: list[int], **params: Any) -> dict[str, Any]:
        """The same in the form of earlier versions: a chat whose prompt comes as token ids beside its messages."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "as in the tokens"}],
            "tokens": token_ids,
            "logprobs": True,
            "return_token_ids": True,
            **params,
        }
        choice = self._post("/v1/chat/completions/tokens", json=body)["choices"][0]
        return {
            "tokens": choice["token_ids"],
            "logprobs": [entry["logprob"] for entry in choice["logprobs"]["content"]],
            "finish": choice["finish_reason"],
        }

    def update_weights(self, weight_dir: Path) -> None:
        """Freeze all engines, leave the marker, have the folder loaded, thaw: also after a refusal."""
        self._post("/pause", params={"mode": "keep", "clear_cache": "false"})
        try:
            (weight_dir / READY).touch()
            self._post("/update_weights", json={"weight_dir": weight_dir.as_posix()})
        finally:
            self._post("/resume")

    def _post(self, path: str, **options: Any) -> Any:
        answer = self._http.post(path, **options)
        if answer.is_error:
            raise RuntimeError(f"{path}: {answer.text}")
        return answer.json()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", help="its name; left out: the first that is served")
    given = parser.parse_args()
    trainer = PrimeRL(given.url)
    served = httpx.get(f"{given.url}/v1/models", timeout=60.0).json()["data"][0]["id"]
    print(f"prompts of at most {trainer.wait_until_ready(given.model or served)} tokens")
    print(f"before: {trainer.generate([1, 2, 3], 'one', max_tokens=8)}")
    trainer.update_weights(given.checkpoint)
    print(f"after: {trainer.generate([1, 2, 3], 'two', max_tokens=8)}")


if __name__ == "__main__":
    main()
