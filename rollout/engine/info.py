"""What tools of the common dialect ask an engine about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..protocol.commands import GetStatus, Status
from .client import EngineClient
from .twins import Asking, asks, awaitable


class InfoCalls(EngineClient):
    """The part of `Engine` that describes it, in dictionaries with the keys that callers look for."""

    model_path: str

    @asks
    def get_server_info(self) -> Asking[dict[str, Any]]:
        """The resolved configuration, sizes and counts; the keys of `status()` and those of the common dialect."""
        status: Status = yield GetStatus()
        return self._server_info(status)

    async_get_server_info = awaitable(get_server_info)

    @asks
    def get_model_info(self) -> Asking[dict[str, Any]]:
        """Which model serves: path, tokenizer, type, and the label and number of its weights."""
        status: Status = yield GetStatus()
        return self._model_info(status)

    async_get_model_info = awaitable(get_model_info)

    def _server_info(self, status: Status) -> dict[str, Any]:
        tp_size, num_engines = self.config.tp_size, self._num_engines()
        on_gpu = str(status.resolved["device"]).startswith("cuda")
        return {
            **status.resolved,
            "model_path": self.model_path,
            "served_model_name": self.model_path,
            "tokenizer_path": self._tokenizer_path(),
            "tp_size": tp_size,
            "pp_size": 1,
            "dp_size": num_engines,
            "ep_size": self.config.ep_size,
            "num_gpus": tp_size * num_engines if on_gpu else 0,
            "enable_memory_saver": True,
            "enable_return_routed_experts": self.config.enable_return_routed_experts,
            "disaggregation_mode": "null",
            "max_total_num_tokens": status.num_blocks * int(status.resolved["block_size"] or 0),
            "num_running_reqs": status.num_running,
            "num_waiting_reqs": status.num_waiting,
            "weight_version": status.weight_version,
            "weight_version_number": status.version,
        }

    def _model_info(self, status: Status) -> dict[str, Any]:
        file = Path(self.config.model_path) / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else {}
        return {
            "model_path": self.model_path,
            "tokenizer_path": self._tokenizer_path(),
            "is_generation": status.resolved["num_labels"] is None,
            "preferred_sampling_params": None,
            "weight_version": status.weight_version,
            "weight_version_number": status.version,
            "model_type": config.get("model_type"),
            "architectures": config.get("architectures"),
        }

    def _num_engines(self) -> int:
        return 1

    def _tokenizer_path(self) -> str | None:
        if self.config.skip_tokenizer_init:
            return None
        return self.config.tokenizer_path or self.config.model_path
