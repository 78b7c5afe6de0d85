"""`scores` on a device: kernels that read what is asked there, and results that come through pinned memory.

Nothing here waits for the device but `result`.

R rows, V vocabulary, M given tokens, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rollout_kernels.logit_stats import LogitStats, compute_stats
from rollout_kernels.token_logprobs import gather_logprobs, top_logprobs

from .scores import Asked, Scored
from .to_host import ToHost

Array = npt.NDArray[Any]
Upload = Callable[[Sequence[Array]], list[torch.Tensor]]


class DeviceScores:
    """`PendingScores` of logits (R, V) in any dtype, whose rows or `rows` are asked about; launched when it is made."""

    def __init__(
        self,
        logits: torch.Tensor,
        asked: Sequence[Asked],
        rows: Sequence[int] | None,
        upload: Upload,
    ) -> None:
        self._asked = asked
        num, vocab_size = len(asked), logits.shape[1]
        widths = np.array([len(one.tokens) for one in asked], np.int32)
        width = int(widths.max(initial=0))
        wanted = np.array([min(one.num_top, vocab_size) for one in asked], np.int32)
        most = int(wanted.max(initial=0))
        tokens = np.full((num, width), -1, np.int32)
        for row, one in enumerate(asked):
            tokens[row, : len(one.tokens)] = one.tokens
        heats = np.array([one.temperature for one in asked], np.float32)
        places = np.arange(num, dtype=np.int32) if rows is None else np.array(rows, np.int32)
        temperature, token_ids, num_wanted, at = upload([heats, tokens, wanted, places])
        logit_rows = None if rows is None else at
        stats = LogitStats.allocate(num, vocab_size, logits.device)
        compute_stats(logits, temperature, stats, logit_rows=logit_rows)
        self._parts = (num, most, width)
        memory = torch.empty(num * (12 * most + 4 * width), dtype=torch.uint8, device=logits.device)
        ids, values, given = self._views(memory)
        if width:
            gather_logprobs(logits, temperature, token_ids, stats, given, logit_rows=logit_rows)
        if most:
            top_logprobs(logits, temperature, num_wanted, stats, ids, values, logit_rows=logit_rows)
        self._fetched = ToHost(memory)

    def _views(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (R, N) int64, their values (R, N), and values of given tokens (R, M), one behind the other."""
        num, most, width = self._parts
        first, second = 8 * num * most, 12 * num * most
        return (
            memory[:first].view(torch.int64).view(num, most),
            memory[first:second].view(torch.float32).view(num, most),
            memory[second:].view(torch.float32).view(num, width),
        )

    def result(self) -> list[Scored]:
        """Wait for the copy."""
        ids, values, given = (part.tolist() for part in self._views(self._fetched.result()))
        return [
            Scored(
                known[: len(one.tokens)],
                list(zip(best[: one.num_top], which[: one.num_top], strict=True)),
            )
            for one, known, best, which in zip(self._asked, given, values, ids, strict=True)
        ]
