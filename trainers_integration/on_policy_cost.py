"""What the forward with the engine's bits costs a trainer, beside transformers' own.

`python -m trainers_integration.on_policy_cost` prints one line of JSON for a random model of Qwen3-0.6B's shape on the
current CUDA device: log-probabilities of the same tokens by both, with and without a backward.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .on_policy import OnPolicyForward


def cost(model: Any, *, num_sequences: int, length: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, for `num_sequences` sequences of `length` tokens on the model's device.

    Equal lengths, so that transformers pads nothing. `of` says which way: "transformers" or "on_policy", and "forward"
    (no gradients) or "both" (with the backward of the sum).
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (num_sequences, length), generator=generator)
    given = ids.to(model.device)
    rows = ids.tolist()
    forward = OnPolicyForward(model)

    def plain() -> torch.Tensor:
        logits = model(given, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, given[:, 1:, None]).sum()

    def on_policy() -> torch.Tensor:
        return torch.stack([part.sum() for part in forward(rows)]).sum()

    def once(way: Callable[[], torch.Tensor], backward: bool) -> float:
        _wait(model.device)
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            total = way()
        if backward:
            total.backward()
            model.zero_grad(set_to_none=True)
        _wait(model.device)
        return 1e3 * (time.perf_counter() - start)

    found: dict[str, Any] = {"sequences": num_sequences, "tokens_of_each": length}
    for name, backward in (("forward", False), ("both", True)):
        for way in (plain, on_policy):
            once(way, backward)
            times = [once(way, backward) for _ in range(repeats)]
            of = "transformers" if way is plain else "on_policy"
            found[f"{of}_{name}_ms"] = round(median(times), 3)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Two shapes of batch: many short sequences, and few long ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rows = [
        cost(model, num_sequences=num, length=length, repeats=5)
        for num, length in ((16, 512), (4, 2048))
    ]
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
