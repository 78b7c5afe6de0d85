"""The surface that an engine has wherever it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weight_sync.report import SyncReport


class EngineBase(ABC):
    """What trainers call, whoever answers: `Engine`, `RolloutPool`, a client by address, or one over HTTP.

    Code that takes an `EngineBase` works with all of them. `Engine` says what arguments mean and what is raised; it has
    more calls than these.
    """

    @abstractmethod
    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        image_data: None = None,
        audio_data: None = None,
        video_data: None = None,
        return_logprob: Any = False,
        logprob_start_len: Any = -1,
        top_logprobs_num: Any = 0,
        token_ids_logprob: Any = None,
        **others: Any,
    ) -> Any:
        """Complete prompts."""

    @abstractmethod
    def update_weights_from_tensor(
        self, named_tensors: Any, load_format: str | None = None, flush_cache: bool = True
    ) -> SyncReport:
        """Write tensors by name."""

    @abstractmethod
    def update_weights_from_disk(
        self, model_path: str | Path, load_format: str | None = None
    ) -> SyncReport:
        """Serve a folder's weights."""

    @abstractmethod
    def get_weight_version(self) -> str:
        """Label of the version that serves now."""

    @abstractmethod
    def pause_generation(self, mode: Any = "abort") -> int:
        """Stop generating until `continue_generation`."""

    @abstractmethod
    def continue_generation(self) -> None:
        """End a pause."""

    @abstractmethod
    def abort_request(self, rid: str | None = None, abort_all: bool = False) -> int:
        """End requests early."""

    @abstractmethod
    def flush_cache(self) -> None:
        """Drop all cached prefixes."""

    @abstractmethod
    def release_memory_occupation(self, tags: Sequence[Any] | None = None) -> Any:
        """Give memory back to the system."""

    @abstractmethod
    def resume_memory_occupation(self, tags: Sequence[Any] | None = None) -> Any:
        """Make released memory usable again."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the engine, or the connection to it."""
