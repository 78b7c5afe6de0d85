"""One step of slime's requests to an external engine: discover, register, generate, abort, update, go on.

    rollout serve --model CHECKPOINT --port 8000
    python examples/http_trainers/slime.py http://127.0.0.1:8000 NEW_CHECKPOINT

Written after slime's main branch of 2026: `slime/backends/sglang_utils` (`external.py`, `sglang_engine.py`,
`server_control.py`), `slime/rollout/sglang_rollout.py` and `megatron_utils/update_weight`.
"""

from __future__ import annotations

import time
from typing import Any

import httpx
from trainer_side import Group, Tensors, arguments, described, in_background

BUCKET = 8
"""Tensors of one call; slime counts bytes (`--update-weight-buffer-size`)."""


class Slime:
    """What slime's Ray actor for an engine, its weight updater and its rollout function send."""

    def __init__(self, url: str, router: str | None = None) -> None:
        self.url = url
        self.generate_url = f"{router or url}/generate"
        self._router = router
        self._http = httpx.Client(timeout=60.0, trust_env=False)
        self._group: Group | None = None
        self.version = 0

    # ---- at the start --------------------------------------------------------------------------------------------

    def discover(self, *, offload_rollout: bool = False) -> dict[str, Any]:
        """What it takes over from `/server_info`, the topology, and what must be as its own options say."""
        info = self._get("/server_info")
        if info["enable_memory_saver"] != offload_rollout:
            raise ValueError(
                "enable_memory_saver: got another value than that of --offload-rollout"
            )
        tp, pp = int(info.get("tp_size") or 1), int(info.get("pp_size") or 1)
        mode = info.get("disaggregation_mode")
        return {
            "num_gpus": int(info.get("num_gpus") or tp * pp),
            "worker_type": mode if mode in ("prefill", "decode") else "regular",
        }

    def register(self, patience_s: float = 30.0) -> None:
        """Tell the router of the engine, if there is one, and wait until the engine generates."""
        if self._router is not None:
            body = {"url": self.url, "worker_type": "regular"}
            self._http.post(f"{self._router}/workers", json=body).raise_for_status()
            end = time.monotonic() + patience_s
            while not any(worker["is_healthy"] for worker in self._workers()):
                if time.monotonic() > end:
                    raise TimeoutError(f"the router at {self._router} has no healthy worker")
                time.sleep(0.1)
        self._get("/health_generate")

    def _workers(self) -> list[dict[str, Any]]:
        found = self._http.get(f"{self._router}/workers").raise_for_status().json()
        return [worker for worker in found["workers"] if worker["url"] == self.url]

    # ---- rollouts ------------------------------------------------------------------------------------------------

    def generate(self, input_ids: list[int], max_new_tokens: int, **params: Any) -> dict[str, Any]:
        """One sample; tokens and log-probabilities are read from `output_token_logprobs`."""
        sampling = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "stop": None,
            "stop_token_ids": None,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "max_new_tokens": max_new_tokens,
            **params,
        }
        body = {"sampling_params": sampling, "return_logprob": True, "input_ids": input_ids}
        answer = self._http.post(self.generate_url, json=body).raise_for_status().json()
        meta = answer["meta_info"]
        return {
            "tokens": [token for _, token, _ in meta["output_token_logprobs"]],
            "logprobs": [value for value, _, _ in meta["output_token_logprobs"]],
            "finish": meta["finish_reason"]["type"],
            "text": answer["text"],
            "weight_version": meta["weight_version"],
        }

    def abort_until_idle(self, patience_s: float = 30.0) -> None:
        """After over-sampling: abort all until nothing runs or waits; who asked gets what there is."""
        end = time.monotonic() + patience_s
        while True:
            self._post("abort_request", {"abort_all": True})
            loads = self._get("/v1/loads?include=core,disagg,queues")["loads"]
            if not any(load["num_reqs"] for load in loads):
                return
            if time.monotonic() > end:
                raise TimeoutError(f"{self.url} does not become idle: {loads}")
            time.sleep(0.1)

    # ---- weights -------------------------------------------------------------------------------------------------

    def connect(self, world_size: int = 2) -> None:
        """`init_weights_update_group` on the engine while the trainer makes its end."""
        self._group = group = Group("slime-pp_0", world_size)
        body = {
            "master_address": "127.0.0.1",
            "master_port": group.port,
            "rank_offset": 1,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
        }
        with in_background() as start:
            start(self._post, "init_weights_update_group", body)
            group.meet()

    def disconnect(self) -> None:
        """Both ends let go."""
        if self._group is not None:
            self._post("destroy_weights_update_group", {"group_name": self._group.name})
            self._group = None

    def update_from_distributed(self, tensors: Tensors, *, mode: str = "abort") -> None:
        """Pause, flush, bucket after bucket over the group, continue."""
        assert self._group is not None, "connect first"
        self._pause(mode)
        names = list(tensors)
        for first in range(0, len(names), BUCKET):
            bucket = {name: tensors[name] for name in names[first : first + BUCKET]}
            body = {
                **described(bucket),
                "group_name": self._group.name,
                "flush_cache": False,
                "weight_version": str(self.version),
            }
            with in_background() as start:  # metadata first, without waiting
                start(self._post, "update_weights_from_distributed", body)
                self._group.broadcast(bucket)
        self._post("continue_generation", {})

    def update_from_disk(self, folder: str, *, mode: str = "abort") -> None:
        """`--update-weight-from-disk`: pause, flush, load a folder, continue."""
        self._pause(mode)
        body = {
            "model_path": folder,
            "flush_cache": True,
            "weight_version": str(self.version),
        }
        self._post("update_weights_from_disk", body)
        self._post("continue_generation", {})

    def update_from_tensor(self, payloads: list[list[str]], load_format: str | None) -> None:
        """Colocated: memory given back in two steps around it, handles of tensors for every rank, bucket by bucket."""
        self._flush()
        self._post("release_memory_occupation", {})
        self._post("resume_memory_occupation", {"tags": ["weights"]})
        self._pause("abort")
        for payload in payloads:
            body = {
                "serialized_named_tensors": payload,
                "load_format": load_format,
                "flush_cache": False,
                "weight_version": str(self.version),
            }
            self._post("update_weights_from_tensor", body)
        self._post("resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
        self._post("continue_generation", {})

    def check_weights(self, action: str) -> None:
        """`--check-weight-update-equal`: "snapshot", "reset_tensors", then, after an update, "compare"."""
        self._post("weights_checker", {"action": action})

    def weight_version(self) -> str:
        """What the engine calls its weights."""
        version: str = self._get("/get_weight_version")["weight_version"]
        return version

    def _pause(self, mode: str) -> None:
        self.version += 1
        self._post("pause_generation", {"mode": mode})
        if mode == "abort":
            self._flush()

    def _flush(self, tries: int = 60) -> None:
        for _ in range(tries):
            if self._http.get(f"{self.url}/flush_cache").status_code == 200:
                return
            time.sleep(0.1)
        raise TimeoutError(f"{self.url} has pending requests")

    def _get(self, path: str) -> Any:
        return self._http.get(f"{self.url}{path}").raise_for_status().json()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._http.post(f"{self.url}/{path}", json=body)
        if answer.is_error:
            raise RuntimeError(f"{path}: {answer.text}")
        return answer.json()


def main() -> None:
    url, tensors = arguments(__doc__ or "")
    trainer = Slime(url)
    print(f"an external engine: {trainer.discover()}")
    trainer.register()
    print(f"before: {trainer.generate([1, 2, 3], 8)}")
    trainer.connect()
    trainer.update_from_distributed(tensors)
    trainer.disconnect()
    print(f"after version {trainer.weight_version()}: {trainer.generate([1, 2, 3], 8)}")


if __name__ == "__main__":
    main()
