"""A tensor on its way to the host."""

from __future__ import annotations

from typing import Any

import torch


class ToHost:
    """The contents that `tensor` has at this place of the current stream; nothing waits for them but `result`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: Any = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = tensor.to("cpu", non_blocking=True)  # pinned
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def result(self) -> torch.Tensor:
        """Wait for the copy; on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
