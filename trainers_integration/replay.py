"""A trainer's forward in which every token goes to the experts that the engine sent it to.

    result = engine.generate(..., return_routed_experts=True)  # Engine(..., enable_return_routed_experts=True)
    with replayed_experts(model, routes):
        logits = model(input_ids=inputs).logits

Trainer and engine round differently, and where two experts' scores are close they choose others: the token's
log-probability jumps, and an importance ratio with it. Replayed, the experts' weights still are the trainer's own, so
gradients reach its router. Idea: Ma and others, "Stabilizing MoE Reinforcement Learning by Aligning Training and
Inference Routers" (rollout routing replay), 2025.

B sequences, T tokens of each, L layers, k experts of a token, X experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from rollout.errors import ConfigError, InvalidRequestError


@contextmanager
def replayed_experts(model: Any, routes: torch.Tensor) -> Iterator[None]:
    """Within it, `model` (B, T) sends tokens to the experts in `routes` (B, T, L, k), of any integer dtype.

    model: a Mixtral, Qwen2-MoE, Qwen3-MoE or GLM-4-MoE of transformers; its parameters stay as they are. A token and
    layer with -1 is routed by the model: padding, layers without experts. Raises `ConfigError` for a model without such
    routers, or one whose layers are computed again in the backward, `InvalidRequestError` for routes of another shape,
    or to experts that it does not have.
    """
    routers = routers_of(model)
    recomputed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    if recomputed and model.training:
        raise ConfigError(
            "model: got one with gradient checkpointing, expected one without: its backward, after the replay, would "
            "send tokens to other experts; call model.gradient_checkpointing_disable()"
        )
    layers = model.config.num_hidden_layers
    if routes.ndim != 4 or routes.shape[2] != layers:
        raise InvalidRequestError(
            f"routes: got the shape {tuple(routes.shape)}, expected (sequences, tokens, {layers} layers, experts of a "
            "token); give one row for each token that the model reads"
        )
    most = min(router.num_experts for router in routers.values())
    if routes.numel() and int(routes.max()) >= most:
        raise InvalidRequestError(
            f"routes: got the expert {int(routes.max())}, expected less than {most}; they are another model's"
        )
    with ExitStack() as stack:
        for layer, router in routers.items():
            given = routes[:, :, layer].flatten(0, 1).long()
            hook = router.register_forward_hook(_replay(given))
            stack.callback(hook.remove)
        yield


def routers_of(model: Any) -> dict[int, Any]:
    """The router of each layer that has one."""
    layers = model.get_decoder().layers
    routers = {
        index: layer.mlp.gate
        for index, layer in enumerate(layers)
        if hasattr(getattr(layer.mlp, "gate", None), "top_k")
    }
    if not routers:
        raise ConfigError(
            f"model: got a {model.config.model_type}, expected a mixture of experts of transformers, whose routers are "
            "`mlp.gate`; leave the replay out"
        )
    return routers


def _replay(given: torch.Tensor) -> Any:
    """A hook that puts `given` (B T, k) in place of what a router chose, with the router's own weights for them."""

    def hook(router: Any, _inputs: Any, output: Any) -> Any:
        logits, weights, ids = output
        if len(given) != len(ids):
            raise InvalidRequestError(
                f"routes: got {len(given)} tokens, expected the {len(ids)} that the model reads"
            )
        here = given.to(ids.device)
        known = (here >= 0).all(-1, keepdim=True)
        chosen = torch.where(known, here, ids)
        own = _weights(router, logits, chosen).to(weights.dtype)
        return logits, torch.where(known, own, weights), chosen

    return hook


def _weights(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As the families' routers compute them, (B T, k) float32."""
    sigmoid = hasattr(router, "e_score_correction_bias")
    scores = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)
    weights = scores.gather(1, ids)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
    scaled: torch.Tensor = weights * getattr(router, "routed_scaling_factor", 1.0)
    return scaled


def padded_routes(routes: Sequence[np.ndarray[Any, Any]], num_tokens: int) -> torch.Tensor:
    """What results have as `routed_experts`, each (tokens - 1, L, k), as (B, `num_tokens`, L, k) int16, -1 behind."""
    shape = (len(routes), num_tokens, *routes[0].shape[1:])
    padded = torch.full(shape, -1, dtype=torch.int16)
    for row, each in zip(padded, routes, strict=True):
        row[: len(each)] = torch.from_numpy(each.astype(np.int16))
    return padded
