"""The demo's model: Qwen3-shaped, dense or a mixture of experts, made from nothing but a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..grpo.batch import TrainBatch, make_batch
from ..grpo.environment import Problem
from ..grpo.losses import masked_mean, token_logprobs
from ..grpo.rollouts import Completion
from .config import ModelConfig, WarmStartConfig
from .tokenizer import EOS, PAD, VOCABULARY


def build_model(config: ModelConfig, *, seed: int) -> Any:
    """A `Qwen3ForCausalLM`, or a `Qwen3MoeForCausalLM`, in float32 with random weights from `seed`.

    All experts of a token together are as wide as the dense layer.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    width = 3 * config.hidden_size
    shape: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": config.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.hidden_size // config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": True,
        "pad_token_id": VOCABULARY.index(PAD),
        "bos_token_id": None,
        "eos_token_id": VOCABULARY.index(EOS),
    }
    if config.kind == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**shape))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **shape,
            num_experts=config.num_experts,
            num_experts_per_tok=config.experts_per_token,
            moe_intermediate_size=width // config.experts_per_token,
            norm_topk_prob=True,
        )
    )


def save_checkpoint(folder: Path, model: Any, tokenizer: Any) -> None:
    """An ordinary Hugging Face folder: config, safetensors, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warm_start(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    config: WarmStartConfig,
    *,
    seed: int,
) -> tuple[int, float]:
    """Supervised steps on the answers until the policy is right now and then, so that RL has rewards to start from.

    Stops at the first step where the expected pass rate of sampling, as a running mean over batches, has reached
    `config.target_pass_rate`. Returns the steps taken and that rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    model.train()
    pass_rate = 0.0
    for step, batch in enumerate(_answer_batches(problems, tokenizer, config.batch_size, seed)):
        logits = model(input_ids=batch.inputs, use_cache=False).logits
        logprobs, _ = token_logprobs(logits, batch.targets, temperature=1.0)
        # What sampling would get right: the probability of the whole answer.
        expected = (logprobs * batch.mask).sum(dim=1).exp().mean().item()
        pass_rate = 0.7 * pass_rate + 0.3 * expected
        if pass_rate >= config.target_pass_rate or step == config.max_steps:
            return step, pass_rate
        optimizer.zero_grad(set_to_none=True)
        (-masked_mean(logprobs, batch.mask)).backward()
        optimizer.step()
    raise AssertionError("batches do not end")


def _answer_batches(
    problems: Sequence[Problem], tokenizer: Any, batch_size: int, seed: int
) -> Iterator[TrainBatch]:
    """Endless batches of prompts with their answers, as if the answers had been sampled."""
    rng = random.Random(seed)
    pool = list(problems)
    while True:
        chosen = rng.sample(pool, min(batch_size, len(pool)))
        answers = [(*tokenizer.encode(p.answer), tokenizer.eos_token_id) for p in chosen]
        completions = [
            Completion(
                prompt_ids=problem.prompt_ids,
                output_ids=answer,
                logprobs=(0.0,) * len(answer),
                spans=(),
                finish_reason="stop",
                latency_s=0.0,
                token_times=(),
            )
            for problem, answer in zip(chosen, answers, strict=True)
        ]
        yield make_batch(completions, torch.zeros(len(completions)))
