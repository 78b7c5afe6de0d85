"""transformers' `generate` as a peer: one left-padded batch, which runs until its longest sample is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .settings import GenerateBench
from .shapes import DTYPES, hf_config
from .workload import Job


def make_checkpoint(settings: GenerateBench, folder: Path, context_length: int) -> Any:
    """A transformers model with random weights, saved in `folder`, where the engine reads it; returns the model."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    values = hf_config(settings.model, settings.dtype, context_length)
    config = AutoConfig.for_model(**values)
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.dtype])
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def run_batch(model: Any, settings: GenerateBench, jobs: Sequence[Job]) -> float:
    """Seconds that transformers takes for the batch; only the tokens that were asked for are useful."""
    pad = model.config.pad_token_id
    longest = max(len(job.prompt) for job in jobs)
    rows = [[pad] * (longest - len(job.prompt)) + job.prompt for job in jobs]
    mask = [[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs]
    num_new = max(job.num_new for job in jobs)
    how: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        how = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            pad_token_id=pad,
            eos_token_id=None,
            **how,
        )
    seconds = time.perf_counter() - start
    assert tuple(out.shape) == (len(jobs), longest + num_new), "transformers stopped early"
    return seconds
