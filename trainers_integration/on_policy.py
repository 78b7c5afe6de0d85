"""A trainer's log-probabilities with the engine's bits: a transformers model computed by the engine's kernels.

An engine with `deterministic=True` and `OnPolicyForward` over the same weights give a sampled token the same
log-probability, bit for bit, so the importance ratio of on-policy data is 1 exactly.

    forward = OnPolicyForward(model)                       # Llama, Mistral, Qwen2 or Qwen3, dense, from transformers
    logprobs = forward([prompt + output for ...], temperature=0.8)
    (-(advantage * logprobs[0][len(prompt) - 1 :])).sum().backward()

Gradients reach the model's own parameters. Trainers that call the model themselves do so within `on_policy(model)`.
Idea and measure: Horace He and Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025.

N sequences, T tokens of all of them, E hidden size, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rollout.errors import ConfigError, InvalidRequestError
from rollout_kernels import differentiable as ops
from rollout_kernels.qk_norm_rope import HeadNorms, rotary_table
from rollout_kernels.sequence_attention import SequenceLayout, sequence_attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class OnPolicyForward:
    """The forward of `model`, whose parameters it reads at each call; nothing in the model is changed.

    model: a dense causal language model of transformers, whole on one device, in one dtype. Raises `ConfigError` for
    any other. With gradient checkpointing switched on in the model, layers are recomputed in the backward.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = config = model.config
        if config.model_type not in FAMILIES:
            raise ConfigError(
                f"model: got the family {config.model_type!r}, expected one of {', '.join(FAMILIES)}; use the model's "
                "own forward"
            )
        foreign = sorted(
            name
            for name, module in model.named_modules()
            if name.endswith("_proj") and type(module) is not torch.nn.Linear
        )
        if foreign:
            raise ConfigError(
                f"model: got {type(model.get_submodule(foreign[0])).__name__} as {foreign[0]}, expected plain linear "
                "layers; merge adapters first"
            )
        self._head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        # On the CPU, as the engine makes them: a power on a GPU may have other bits.
        with torch.device("cpu"):
            rotary = type(model.model.rotary_emb)(config)
        self._frequencies = rotary.inv_freq.float()
        self._table: torch.Tensor | None = None

    def __call__(
        self, sequences: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """For each sequence of n token ids, the log-probabilities of its tokens 1 to n - 1: (n - 1), float32.

        As an engine reports them for tokens that it drew with `temperature`; 0 (greedy) reports untempered ones.
        """
        lengths = [len(ids) for ids in sequences]
        limit = self._config.max_position_embeddings
        if not lengths or min(lengths) < 2 or max(lengths) > limit:
            raise InvalidRequestError(
                f"sequences: got {len(lengths)} of lengths {sorted(set(lengths))[:8]}, expected at least one, each of "
                f"2 to {limit} tokens"
            )
        if not temperature >= 0:
            raise InvalidRequestError(f"temperature: got {temperature}, expected at least 0")
        weight = self._model.get_input_embeddings().weight
        token_ids = torch.tensor([t for ids in sequences for t in ids], device=weight.device)
        hidden = self._hidden(token_ids, lengths)
        ends = list(accumulate(lengths))
        last = torch.zeros(len(token_ids), dtype=torch.bool)
        last[torch.tensor(ends) - 1] = True
        rows = (~last).nonzero().squeeze(1).to(weight.device)
        logprobs = ops.head_logprobs(
            hidden.index_select(0, rows),
            self._model.get_output_embeddings().weight,
            token_ids[rows + 1].to(torch.int32),
            temperature or 1.0,
        )
        return list(logprobs.split([length - 1 for length in lengths]))

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        logits_to_keep: int = 0,
        past_key_values: None = None,
        **others: Any,
    ) -> Any:
        """What `model(input_ids (B, L), attention_mask (B, L))` returns: an output with `logits` (B, L, V).

        Zeros where the mask is 0, on whichever side; positions are counted from each row's first token. The last
        `logits_to_keep` columns, if it is not 0. Raises `InvalidRequestError` for a cache, or labels.
        """
        from transformers.modeling_outputs import CausalLMOutput

        given = sorted(name for name in ("labels", "inputs_embeds") if others.get(name) is not None)
        if past_key_values is not None or given:
            raise InvalidRequestError(
                f"forward: got {given or 'past_key_values'}, expected input_ids and attention_mask alone; call the "
                "model outside of on_policy for the rest"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        lengths = mask.sum(1).tolist()
        hidden = self._hidden(input_ids[mask], [length for length in lengths if length])
        wide = hidden.new_zeros((*input_ids.shape, hidden.shape[1]))
        wide = wide.masked_scatter(mask[..., None], hidden)[:, -logits_to_keep:]
        kept = mask[:, -logits_to_keep:]
        flat = ops.linear(wide[kept], self._model.get_output_embeddings().weight)
        logits = flat.new_zeros((*kept.shape, flat.shape[1]))
        return CausalLMOutput(logits=logits.masked_scatter(kept[..., None], flat))

    def _hidden(self, token_ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """token_ids (T) -> (T, E) after the final norm."""
        inner = self._model.model
        residual = torch.nn.functional.embedding(token_ids, inner.embed_tokens.weight)
        positions = torch.cat([torch.arange(length) for length in lengths])
        positions = positions.to(device=token_ids.device, dtype=torch.int32)
        layout = SequenceLayout(tuple(lengths), token_ids.device)
        again = bool(getattr(inner, "gradient_checkpointing", False)) and inner.training
        run: Callable[..., Any] = _recomputed if again else _plainly
        x: torch.Tensor | None = None
        for index, layer in enumerate(inner.layers):
            residual, x = run(self._layer, layer, index, residual, x, positions, layout)
        _, normed = ops.add_rms_norm(residual, x, inner.norm.weight, inner.norm.variance_epsilon)
        return normed

    def _layer(
        self,
        layer: Any,
        index: int,
        residual: torch.Tensor,
        x: torch.Tensor | None,
        positions: torch.Tensor,
        layout: SequenceLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What came before, (T, E) and (T, E) that is still to be added to it -> the same after this layer."""
        norm = layer.input_layernorm
        residual, normed = ops.add_rms_norm(residual, x, norm.weight, norm.variance_epsilon)
        attended = self._attend(layer.self_attn, index, normed, positions, layout)
        norm = layer.post_attention_layernorm
        residual, normed = ops.add_rms_norm(residual, attended, norm.weight, norm.variance_epsilon)
        mlp = layer.mlp
        fused = torch.cat((_linear(normed, mlp.gate_proj), _linear(normed, mlp.up_proj)), -1)
        return residual, _linear(ops.silu_mul(fused), mlp.down_proj)

    def _attend(
        self,
        attention: Any,
        index: int,
        x: torch.Tensor,
        positions: torch.Tensor,
        layout: SequenceLayout,
    ) -> torch.Tensor:
        config = self._config
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = torch.cat([_linear(x, projection) for projection in projections], -1)
        norms = None
        if hasattr(attention, "q_norm"):
            norms = HeadNorms(
                query=attention.q_norm.weight,
                key=attention.k_norm.weight,
                eps=attention.q_norm.variance_epsilon,
            )
        queries, keys, values = ops.rotated(
            qkv,
            self._angles(x),
            positions,
            config.num_attention_heads,
            config.num_key_value_heads,
            norms,
        )
        attended = sequence_attention(
            queries,
            keys,
            values,
            layout,
            scale=self._head_dim**-0.5,
            window=self._window(index),
        )
        return _linear(attended.flatten(1), attention.o_proj)

    def _angles(self, like: torch.Tensor) -> torch.Tensor:
        table = self._table
        if table is None or (table.device, table.dtype) != (like.device, like.dtype):
            frequencies = self._frequencies.to(like.device)
            positions = self._config.max_position_embeddings
            table = self._table = rotary_table(frequencies, positions, like.dtype)
        return table

    def _window(self, index: int) -> int | None:
        config = self._config
        window: int | None = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if config.model_type == "llama" or window is None:
            return None
        if kinds is not None and config.model_type != "mistral":
            return window if kinds[index] == "sliding_attention" else None
        return window


@contextmanager
def on_policy(model: Any) -> Iterator[OnPolicyForward]:
    """Within it, `model(input_ids, attention_mask)` computes its logits by the engine's kernels.

    The logits have the bits of a deterministic engine's; log-probabilities that a trainer makes of them have the
    rounding of its own formula. Those of the `OnPolicyForward` that this yields are the engine's to the last bit.
    """
    forward = OnPolicyForward(model)
    model.forward = forward.logits
    try:
        yield forward
    finally:
        del model.forward


def _linear(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return ops.linear(x, layer.weight, layer.bias)


def _plainly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)
