"""One set of bits for a token: in any batch of a deterministic engine, and in a trainer's forward by the same kernels.

Triton's interpreter is chosen when triton is imported, so the checks run in a process of their own; on a GPU in this.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deterministic_support import (
    FAMILIES,
    PROMPT,
    STRANGERS,
    check_any_batch_chunk_or_prefix,
    folder_of,
    make_model,
    sample,
)
from interpreted import Checks

from rollout import Engine
from rollout.errors import ConfigError

CHECKS = Checks()


@CHECKS.add()
def any_batch_chunk_or_prefix(device: torch.device) -> None:
    check_any_batch_chunk_or_prefix(make_model("qwen3", torch.float32), device)


@CHECKS.add(*({"family": family} for family in FAMILIES))
def a_trainers_forward(device: torch.device, family: str) -> None:
    from trainers_integration.on_policy import OnPolicyForward

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(family, dtype)
    with folder_of(model) as folder:
        tokens, logprobs = sample(folder, [PROMPT, STRANGERS[0]], device)
    forward = OnPolicyForward(model.to(device))
    (own, _) = forward([PROMPT + tokens, STRANGERS[1]], temperature=0.8)
    assert own[len(PROMPT) - 1 :].tolist() == logprobs
    plain = reference(model, PROMPT + tokens, 0.8)
    torch.testing.assert_close(
        own, plain.float(), atol=1e-5 if dtype == torch.float32 else 0.3, rtol=0
    )


@CHECKS.add(*({"family": family} for family in FAMILIES))
def gradients(device: torch.device, family: str) -> None:
    from trainers_integration.on_policy import OnPolicyForward

    model = make_model(family, torch.float32).to(device)
    forward = OnPolicyForward(model)
    sequences = [PROMPT[:9], STRANGERS[0]]
    if family == "llama":  # layers are recomputed
        model.gradient_checkpointing_enable()
        model.train()
    torch.cat(forward(sequences, temperature=0.8)).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.cat([reference(model, ids, 0.8) for ids in sequences]).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=2e-3, atol=2e-3, msg=name)


@CHECKS.add()
def a_model_that_a_trainer_calls(device: torch.device) -> None:
    from rollout.errors import InvalidRequestError
    from trainers_integration.on_policy import on_policy

    model = make_model("qwen3", torch.float32).to(device)
    ids = torch.tensor([[0, 0, *PROMPT[:8]], [*PROMPT[:6], 0, 0, 0, 0]], device=device)
    mask = torch.tensor([[0, 0, *[1] * 8], [*[1] * 6, 0, 0, 0, 0]], device=device)
    plain = [model(torch.tensor([PROMPT[:n]], device=device)).logits[0] for n in (8, 6)]
    with on_policy(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = model(ids, attention_mask=mask, logits_to_keep=3).logits
        with pytest.raises(InvalidRequestError, match="labels"):
            model(ids, attention_mask=mask, labels=ids)
    for got, want in zip((logits[0, 2:], logits[1, :6]), plain, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert not logits[0, :2].any() and not logits[1, 6:].any()
    assert torch.equal(last, logits[:, -3:])
    last.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert "forward" not in model.__dict__


@CHECKS.add()
def what_it_costs(device: torch.device) -> None:
    from trainers_integration.on_policy_cost import cost

    found = cost(
        make_model("llama", torch.float32).to(device), num_sequences=2, length=5, repeats=1
    )
    times = {key: value for key, value in found.items() if key.endswith("_ms")}
    assert len(times) == 4 and min(times.values()) > 0


def reference(model: Any, ids: list[int], temperature: float) -> torch.Tensor:
    given = torch.tensor([ids], device=model.device)
    logits = model(given).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, given[0, 1:, None]).squeeze(1)


verdicts, test_interpreted, test_on_gpu = CHECKS.as_tests(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_at_realistic_widths(family: str) -> None:
    from trainers_integration.on_policy import OnPolicyForward

    model = make_model(
        family,
        torch.bfloat16,
        vocab_size=32_003,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        initializer_range=0.03,
        use_sliding_window=False,
        sliding_window=None,
        layer_types=None,
    )
    device = torch.device("cuda")
    shared = [(7 * i) % 31_999 for i in range(300)]
    prompts = [[*shared, i] for i in range(6)] + [shared[:70], [3, 1]]
    with folder_of(model) as folder:
        with Engine(
            folder,
            device="cuda",
            deterministic=True,
            skip_tokenizer_init=True,
            chunked_prefill_size=256,
            kv_cache_bytes=1 << 28,
            max_running_requests=64,
        ) as engine:
            results = engine.generate(
                input_ids=prompts,
                sampling_params={"max_new_tokens": 40, "temperature": 0.8, "ignore_eos": True},
                return_logprob=True,
            )
    forward = OnPolicyForward(model.to(device))
    sequences = [p + r["output_ids"] for p, r in zip(prompts, results, strict=True)]
    found = forward(sequences, temperature=0.8)
    for prompt, result, own in zip(prompts, results, found, strict=True):
        sampled = [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
        assert own[len(prompt) - 1 :].tolist() == sampled


def test_where_it_cannot_be_held_it_is_refused(tiny_checkpoint: Any) -> None:
    folder = tiny_checkpoint("llama")
    with pytest.raises(ConfigError, match=r"deterministic: got attention_backend 'torch' on cpu"):
        Engine(folder, device="cpu", deterministic=True)
    with pytest.raises(ConfigError, match=r"deterministic: .*tp_size 2, expected"):
        Engine(
            folder,
            device="cpu",
            attention_backend="triton",
            deterministic=True,
            tp_size=2,
            executor="local",
        )


def test_other_models_are_refused_by_name() -> None:
    from trainers_integration.on_policy import OnPolicyForward

    model = make_model("llama", torch.float32)
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ConfigError, match=r"got Sequential as model\.layers\.1\.mlp\.up_proj"):
        OnPolicyForward(model)
    model.config.model_type = "gpt2"
    with pytest.raises(ConfigError, match="got the family 'gpt2', expected one of llama"):
        OnPolicyForward(model)


if __name__ == "__main__":
    CHECKS.main()
