"""Names for the parts of a layer in a profile; they are in the way of nothing while there is no profile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..layers.norm import RMSNorm
from ..layers.step import LayerStep
from ..models.decoder import Decoder, DecoderLayer

Named = Callable[[str], AbstractContextManager[Any]]
"""The context of a part, by its name."""


class LayerRanges:
    """Until `close`, the layers of a model run in ranges "attention" and "ffn", and `over` makes norms ranges too.

    A captured graph has no ranges: its kernels run without the host, and have names of their own.
    """

    def __init__(self, model: Decoder, named: Named) -> None:
        self._named = named
        self._modules: list[torch.nn.Module] = []
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            for name, module in (("attention", layer.attention), ("ffn", layer.feed_forward)):
                # An attribute of the object is found before the method of its class.
                module.__dict__["forward"] = self._ranged(name, module.forward)
                self._modules.append(module)

    def over(self, step: LayerStep) -> LayerStep:
        """The same step, whose norms are ranges."""
        return _NamedStep(step, self._named)

    def close(self) -> None:
        """No ranges any more."""
        for module in self._modules:
            del module.__dict__["forward"]

    def _ranged(self, name: str, forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def ranged(*arguments: Any) -> torch.Tensor:
            with self._named(name):
                return forward(*arguments)

        return ranged


class _NamedStep:
    """A `LayerStep` around another."""

    def __init__(self, step: LayerStep, named: Named) -> None:
        self._named = named
        self._norm = step.norm
        self.take = step.take
        self.attend = step.attend
        self.experts = step.experts
        self.route = step.route
        self.gate = step.gate

    def norm(self, residual: torch.Tensor, x: torch.Tensor | None, norm: RMSNorm) -> torch.Tensor:
        """The other's, in a range."""
        with self._named("norm"):
            return self._norm(residual, x, norm)
