"""How far log-probabilities in bfloat16 are from transformers in float32: an engine's, and transformers' own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rollout import Engine


@dataclass(frozen=True, slots=True)
class Errors:
    """Root mean squares over the same tokens, natural logarithms."""

    engine: float
    transformers: float
    num_tokens: int


def errors_of(folder: Path, device: str, *, longest: int, **options: Any) -> Errors:
    """Prompts in one piece and in chunks, decode, prefix hits, and eight samples that share a prompt.

    options: of the engine. longest: tokens of the longest prompt.
    """
    rng = random.Random(5)
    prompts = [[rng.randrange(250) for _ in range(size)] for size in (longest, 17, 2, longest // 3)]
    sampling = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    engine_options = {
        "dtype": "bfloat16",
        "device": device,
        "chunked_prefill_size": 64,
        "kv_cache_bytes": 64 << 20,
        "max_running_requests": 16,
        "context_length": 2 * longest,
        "seed": 3,
        **options,
    }
    with Engine(folder, **engine_options) as engine:
        found = engine.generate(
            input_ids=prompts, sampling_params=sampling, return_logprob=True, logprob_start_len=0
        )
        prompts.append(prompts[0] + [7, 5, 3])
        several = engine.generate(
            input_ids=prompts[-1:], sampling_params={**sampling, "n": 8}, return_logprob=True
        )
    block = engine_options.get("block_size", 16)
    assert max(r["meta_info"]["cached_tokens"] for r in several) >= longest // block * block
    sequences = [p + r["output_ids"] for p, r in zip(prompts, found, strict=False)]
    sequences += [prompts[-1] + r["output_ids"] for r in several]
    got = [
        [value for value, _, _ in result["meta_info"].get("input_token_logprobs", ())][1:]
        + [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
        for result in found + several
    ]
    exact, rounded = (
        _of_transformers(folder, device, dtype, sequences)
        for dtype in (torch.float32, torch.bfloat16)
    )
    ends = [len(values) for values in got]
    want = torch.cat([x[-n:] for x, n in zip(exact, ends, strict=True)])
    own = torch.cat([x[-n:] for x, n in zip(rounded, ends, strict=True)])
    values = torch.tensor([value for part in got for value in part], dtype=torch.float64)
    return Errors(
        float((values - want).square().mean().sqrt()),
        float((own - want).square().mean().sqrt()),
        len(values),
    )


def _of_transformers(
    folder: Path, device: str, dtype: torch.dtype, sequences: list[list[int]]
) -> list[torch.Tensor]:
    """Log-probabilities of tokens 1 to n - 1 of each sequence; weights are rounded to bfloat16 in either dtype."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(dtype).to(device).eval()
    found = []
    with torch.no_grad():
        for ids in sequences:
            given = torch.tensor([ids], device=device)
            logprobs = model(given).logits[0, :-1].float().log_softmax(-1)
            found.append(logprobs.gather(1, given[0, 1:, None]).squeeze(1).double().cpu())
    return found
