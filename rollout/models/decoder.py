"""The decoder that all families share; a family is the options of `ModelConfig`.

T tokens of a step (no batch axis: sequences lie one after another), R rows to sample from, E hidden size, H query heads
and K KV heads of this rank, D head size, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from weight_sync.layout.fused import Fused
from weight_sync.layout.weight_map import Placement, WeightMap

from ..layers.embedding import ParallelLMHead, VocabParallelEmbedding
from ..layers.linear import ColumnParallelLinear, RowParallelLinear
from ..layers.norm import RMSNorm
from ..layers.rotary import RotaryEmbedding
from ..layers.score_head import ScoreHead
from ..layers.shards import OutputRows, split_evenly, split_kv_heads
from ..layers.single_group import TensorParallelGroup
from ..layers.step import AttentionLayer, LayerStep
from .arena import ParameterArena
from .derived_state import DerivedState, refresh_all
from .feed_forward import MixtureOfExperts, make_feed_forward
from .model_config import ModelConfig


class Attention(nn.Module):
    """Self-attention of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tp: TensorParallelGroup,
    ) -> None:
        super().__init__()
        head_dim = config.head_dim
        first_head, self.num_heads = split_evenly("num_attention_heads", config.num_heads, tp)
        first_kv, self.num_kv_heads = split_kv_heads(config.num_kv_heads, tp)
        self.head_dim = head_dim
        self.qkv = ColumnParallelLinear(
            "qkv_proj",
            config.hidden_size,
            (
                _heads("q_proj", config.num_heads, first_head, self.num_heads, head_dim),
                _heads("k_proj", config.num_kv_heads, first_kv, self.num_kv_heads, head_dim),
                _heads("v_proj", config.num_kv_heads, first_kv, self.num_kv_heads, head_dim),
            ),
            bias=config.qkv_bias,
        )
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.output = RowParallelLinear(
            "o_proj",
            config.num_heads * head_dim,
            config.hidden_size,
            bias=config.output_bias,
            tp=tp,
        )
        self.layer = AttentionLayer(
            index=layer,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=head_dim,
            sliding_window=config.sliding_windows[layer],
            q_norm=self.q_norm,
            k_norm=self.k_norm,
        )

    def forward(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        """x (T, E) -> (T, E)."""
        return self.output(step.attend(self.qkv(x), self.layer))

    def placements(self, prefix: str) -> Iterator[Placement]:
        """Parts of the checkpoint in memory order."""
        yield from self.qkv.placements(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.placements(f"{prefix}.q_norm")
            yield from self.k_norm.placements(f"{prefix}.k_norm")
        yield from self.output.placements(prefix)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on a normalised input; what they give is added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, tp: TensorParallelGroup, ep_size: int
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer, tp)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = make_feed_forward(config, layer, tp, ep_size)

    def forward(
        self, residual: torch.Tensor, x: torch.Tensor | None, step: LayerStep
    ) -> torch.Tensor:
        """Add x (T, E), what the layer before contributes, to residual (T, E), in place; this layer's contribution."""
        normed = step.norm(residual, x, self.attention_norm)
        normed = step.norm(residual, self.attention(normed, step), self.feed_forward_norm)
        return self.feed_forward(normed, step)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """Parts of the checkpoint in memory order."""
        yield from self.attention_norm.placements(f"{prefix}.input_layernorm")
        yield from self.attention.placements(f"{prefix}.self_attn")
        yield from self.feed_forward_norm.placements(f"{prefix}.post_attention_layernorm")
        yield from self.feed_forward.placements(f"{prefix}.mlp")


@dataclass(frozen=True, slots=True)
class GivenRows:
    """What the first layer reads at some tokens in place of their embeddings."""

    rows: torch.Tensor
    """(G) int64, which of the T."""
    values: torch.Tensor
    """(G, E) in the parameters' dtype."""


class Decoder(nn.Module):
    """Embedding, layers, final norm and output head of one rank.

    Parameters are registered in the order in which `placements` names them; the arena lays them out in that order.
    `build_model` sets `arena` and `weight_map`.
    """

    arena: ParameterArena
    weight_map: WeightMap

    def __init__(
        self, config: ModelConfig, tp: TensorParallelGroup, device: torch.device, ep_size: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        self.tp = tp
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, tp, ep_size) for layer in range(config.num_layers)
        )
        self._computed = list(self._decoder_layers())
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head: VocabParallelEmbedding | ScoreHead
        if config.num_labels is not None:
            self.head = ScoreHead(config.num_labels, config.hidden_size)
        elif config.tie_word_embeddings:
            self.head = self.embedding
        else:
            self.head = ParallelLMHead(config.vocab_size, config.hidden_size, tp)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, device)
        """Angles of positions; the step's to apply."""
        self.derived_state: tuple[DerivedState, ...] = ()
        """What is a function of the parameters and kept beside them: nothing in today's families. Fused projections are
        parameters, and a tied head is the embedding."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return split_kv_heads(self.config.num_kv_heads, self.tp)[1]

    @property
    def attention_layer(self) -> AttentionLayer:
        """The first layer's attention; sizes are the same in all."""
        return next(self._decoder_layers()).attention.layer

    def _decoder_layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def forward(
        self, token_ids: torch.Tensor, step: LayerStep, given: GivenRows | None = None
    ) -> torch.Tensor:
        """token_ids (T) -> hidden states after the final norm, (T, E), valid until the next step."""
        shape = (token_ids.shape[0], self.config.hidden_size)
        residual = self.embedding(token_ids, step.take("residual", shape))
        if given is not None:
            residual.index_copy_(0, given.rows, given.values)
        x: torch.Tensor | None = None
        for layer in self._computed:
            x = layer(residual, x, step)
        return step.norm(residual, x, self.norm)

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Within, `forward` computes two layers of each kind: they launch whatever the others do."""
        whole, kinds = self._computed, Counter[object]()
        self._computed = []
        for layer in whole:
            kind = type(layer.feed_forward), layer.attention.layer.sliding_window
            kinds[kind] += 1
            if kinds[kind] <= 2:
                self._computed.append(layer)
        try:
            yield
        finally:
            self._computed = whole

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (R, E) -> (R, V) in the parameters' dtype, the full vocabulary on every rank; in `out`, if any.

        Of a classifier the scores, (R, num_labels).
        """
        return self.head.logits(hidden, out)

    def placements(self) -> Iterator[Placement]:
        """Every parameter of this rank as parts of the checkpoint, in memory order; the tied head is the embedding."""
        yield from self.embedding.placements("model.embed_tokens")
        for index, layer in enumerate(self._decoder_layers()):
            yield from layer.placements(f"model.layers.{index}")
        yield from self.norm.placements("model.norm")
        if self.head is not self.embedding:
            name = "lm_head" if self.config.num_labels is None else "score"
            yield from self.head.placements(name)

    def fused_names(self) -> Iterator[tuple[str, Fused | tuple[str, ...]]]:
        """Names of fused projections and stacked experts, and of the checkpoint tensors that each is made of."""
        for index, layer in enumerate(self._decoder_layers()):
            yield from layer.attention.qkv.fused_names(f"model.layers.{index}.self_attn")
            yield from layer.feed_forward.fused_names(f"model.layers.{index}.mlp")

    def aliases(self) -> Iterator[tuple[str, str]]:
        """Other names of checkpoint tensors, each with the one in `placements`."""
        if self.head is self.embedding:
            yield "lm_head.weight", "model.embed_tokens.weight"
        for index, layer in enumerate(self._decoder_layers()):
            yield from layer.feed_forward.aliases(f"model.layers.{index}.mlp")

    def count_experts(self, counts: torch.Tensor | None) -> None:
        """From now on add to `counts` (layers, experts) int64, on the device, where tokens go; None: no more."""
        for index, layer in enumerate(self._decoder_layers()):
            part = layer.feed_forward
            if isinstance(part, MixtureOfExperts):
                part.counts = None if counts is None else counts[index]

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within, `forward` adds nothing to what `count_experts` was given."""
        parts = [part for part in self.modules() if isinstance(part, MixtureOfExperts)]
        counts = [part.counts for part in parts]
        for part in parts:
            part.counts = None
        try:
            yield
        finally:
            for part, count in zip(parts, counts, strict=True):
                part.counts = count

    def refresh_derived_state(self) -> None:
        """Recompute whatever is a function of the parameters, and check it; the engine calls it after every commit."""
        refresh_all(self.derived_state)


def _heads(name: str, num_heads: int, first: int, count: int, head_dim: int) -> OutputRows:
    return OutputRows(
        name=name, full=num_heads * head_dim, start=first * head_dim, size=count * head_dim
    )
