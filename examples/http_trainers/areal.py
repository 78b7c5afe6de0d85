"""One step of AReaL's requests to an SGLang server: health, generate, pause, update, go on, resubmit what was aborted.

    rollout serve --model CHECKPOINT --port 8000
    python examples/http_trainers/areal.py http://127.0.0.1:8000 NEW_CHECKPOINT

Written after AReaL 1.0.4: `areal/engine/sglang_remote.py` and `areal/infra/remote_inf_engine.py`. `make test-clients`
runs AReaL's own `RemoteSGLangEngine`.
"""

from __future__ import annotations

import threading
from typing import Any

import httpx
from trainer_side import Group, Tensors, arguments, described, in_background


class Areal:
    """What `RemoteInfEngine` with its SGLang backend sends."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60.0, trust_env=False)
        self.version = 0
        self._group: Group | None = None
        self._going_on = threading.Event()
        self._going_on.set()

    def wait_until_ready(self) -> None:
        """`GET /health`, with an empty object as its body."""
        self._http.request("GET", "/health", json={}).raise_for_status()

    def generate(self, input_ids: list[int], max_new_tokens: int, **params: Any) -> dict[str, Any]:
        """One sample. What was aborted is sent again, prompt and output, with as many tokens fewer, until it has ended
        by itself; every token gets the trainer's version of then."""
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        reason = None
        while reason not in ("stop", "tool_calls", "length") and len(tokens) < max_new_tokens:
            self._going_on.wait()
            sampling = {
                "top_p": 1.0,
                "top_k": 100_000_000,
                "temperature": 1.0,
                "stop_token_ids": [],
                "ignore_eos": False,
                "skip_special_tokens": True,
                "frequency_penalty": 0.0,
                "max_new_tokens": max_new_tokens - len(tokens),
                **params,
            }
            body = {
                "input_ids": [*input_ids, *tokens],
                "image_data": [],
                "sampling_params": sampling,
                "return_logprob": True,
                "stream": False,
            }
            meta = self._post("/generate", body)["meta_info"]
            reason = meta["finish_reason"]["type"]
            part = meta["output_token_logprobs"]
            logprobs += [value for value, _, _ in part]
            tokens += [token for _, token, _ in part]
            versions += [self.version] * len(part)
        if reason == "abort":
            reason = "length"
        return {"tokens": tokens, "logprobs": logprobs, "versions": versions, "finish": reason}

    def score(self, input_ids: list[int], target_len: int) -> list[float]:
        """Log-probabilities of the last `target_len` ids, for a teacher or a reference."""
        body = {
            "input_ids": input_ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": max(0, len(input_ids) - target_len - 1),
            "top_logprobs_num": 0,
            "stream": False,
        }
        found = self._post("/generate", body)["meta_info"]["input_token_logprobs"]
        return [value for value, _, _ in found][-target_len:]

    def update_from_disk(self, folder: str) -> None:
        """`weight_update_mode=disk`."""
        self._pause()
        body = {"model_path": folder, "abort_all_requests": True}
        self._post("/update_weights_from_disk", body)
        self._continue()

    def connect(self, world_size: int = 2) -> None:
        """`weight_update_mode=xccl`: the port travels as text."""
        self._group = group = Group("update_weight_group", world_size)
        body = {
            "master_address": "127.0.0.1",
            "master_port": str(group.port),
            "rank_offset": 1,
            "world_size": world_size,
            "backend": group.backend,
            "group_name": group.name,
        }
        with in_background() as start:
            start(self._post, "/init_weights_update_group", body)
            group.meet()

    def update_from_distributed(self, tensors: Tensors, bucket: int = 8) -> None:
        """The same over the group, bucket by bucket."""
        assert self._group is not None, "connect first"
        self._pause()
        names = list(tensors)
        for first in range(0, len(names), bucket):
            part = {name: tensors[name] for name in names[first : first + bucket]}
            body = {
                **described(part),
                "group_name": self._group.name,
                "abort_all_requests": True,
            }
            with in_background() as start:
                start(self._post, "/update_weights_from_distributed", body)
                self._group.broadcast(part)
        self._continue()

    def offload(self) -> None:
        """Give the engine's memory back while the trainer needs it."""
        self._post("/release_memory_occupation", {})

    def onload(self, tags: list[str] | None = None) -> None:
        """Take it again."""
        self._post("/resume_memory_occupation", {} if tags is None else {"tags": tags})

    def _pause(self) -> None:
        self._going_on.clear()
        self._post("/pause_generation", {})

    def _continue(self) -> None:
        self._post("/continue_generation", {})
        self.version += 1
        self._going_on.set()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._http.post(path, json=body)
        if answer.is_error:
            raise RuntimeError(f"{path}: {answer.text}")
        return answer.json()


def main() -> None:
    url, tensors = arguments(__doc__ or "")
    trainer = Areal(url)
    trainer.wait_until_ready()
    print(f"before: {trainer.generate([1, 2, 3], 8)}")
    trainer.connect()
    trainer.update_from_distributed(tensors)
    print(f"after: {trainer.generate([1, 2, 3], 8)}")


if __name__ == "__main__":
    main()
