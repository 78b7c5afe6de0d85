"""Penalties, biases and minimum lengths: changes of single logits before a token is drawn.

Order: repetition penalty over prompt and output, then frequency and presence penalty over the output, then the bias;
then tokens that would end the request too early get probability zero. Each touches only the tokens it is about, so the
cost goes with the number of different tokens in a request and not with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sampling_params import SamplingParams
from ..scheduling.request import Request


class TokenCounts:
    """The different tokens of one request and how often each occurs in its output; kept up step by step."""

    def __init__(self, request: Request) -> None:
        self._start(request)

    def _start(self, request: Request) -> None:
        prompt = np.unique(np.asarray(request.known_prompt, np.int64))
        if request.params.repetition_penalty == 1.0:
            prompt = prompt[:0]
        self._size = len(prompt)
        self._ids = np.concatenate([prompt, np.empty(64, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)
        self._slots = {int(token): slot for slot, token in enumerate(prompt)}
        self._num_seen = request.num_prompt_tokens

    def update(self, request: Request) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Take in the tokens that were added since; token ids and their counts in the output (views)."""
        tokens = request.token_ids
        if len(tokens) < self._num_seen:  # some were taken back
            self._start(request)
        for position in range(self._num_seen, len(tokens)):
            self._count(tokens[position])
        self._num_seen = len(tokens)
        return self._ids[: self._size], self._counts[: self._size]

    def _count(self, token: int) -> None:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._size
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token
            self._size += 1
        self._counts[slot] += 1


def is_editable(params: SamplingParams) -> bool:
    """Logits of a request with these parameters may have to be changed before a token is drawn."""
    return params.has_penalties or params.logit_bias is not None or params.min_new_tokens > 0


def is_edited(request: Request) -> bool:
    """The next token's logits are changed; a minimum length matters until it is reached."""
    params = request.params
    return (
        params.has_penalties
        or params.logit_bias is not None
        or request.num_output_tokens < params.min_new_tokens
    )


def edit_logits(logits: Tensor, requests: Sequence[Request]) -> None:
    """Change (R, V) float32 logits in place, row i for `requests[i]`."""
    _apply_penalties(logits, requests)
    for row, request in enumerate(requests):
        params = request.params
        if params.logit_bias is not None:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if request.stop_ids and request.num_output_tokens < params.min_new_tokens:
            logits[row, list(request.stop_ids)] = float("-inf")


def _apply_penalties(logits: Tensor, requests: Sequence[Request]) -> None:
    cells, counts, penalties, lengths = [], [], [], []
    for row, request in enumerate(requests):
        params = request.params
        if not params.has_penalties:
            continue
        if request.sampler_state is None:
            request.sampler_state = TokenCounts(request)
        ids, count = request.sampler_state.update(request)
        cells.append(ids + row * logits.shape[1])
        counts.append(count)
        lengths.append(len(ids))
        penalties.append(
            (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        )
    if not cells:
        return
    where = torch.from_numpy(np.concatenate(cells)).to(logits.device)
    count_of = torch.from_numpy(np.concatenate(counts)).to(logits.device)
    per_cell = np.repeat(np.asarray(penalties, np.float32), lengths, axis=0)
    repetition, frequency, presence = torch.from_numpy(per_cell).to(logits.device).unbind(1)
    flat = logits.view(-1)
    values = flat[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * count_of + presence * (count_of > 0)
    flat[where] = values
