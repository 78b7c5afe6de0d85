"""Rotary position embedding: default, linear and llama3 frequencies.

T tokens, H heads, D head size, R of its features rotated. Cosines are made once per step, in float32, and
cast to the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions turn into angles."""

    theta: float
    """Base of the frequencies."""
    kind: Literal["default", "linear", "llama3"] = "default"
    """"linear" divides all frequencies by `factor`, "llama3" only the low ones."""
    factor: float = 1.0
    """By how much the context is stretched; unused by "default"."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above `original_max_position` / this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below `original_max_position` / this are left alone."""
    original_max_position: int = 0
    """llama3: context length before stretching."""
    fraction: float = 1.0
    """Part of each head that is rotated, its first features; the others stay as they are."""

    def rotary_dim(self, head_dim: int) -> int:
        """Features of a head that are rotated."""
        return int(head_dim * self.fraction)

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Angle per position for each pair of rotated features: (R / 2), float32, on the CPU."""
        dim = self.rotary_dim(head_dim)
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        frequencies = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            return self._stretch_low(frequencies)
        return frequencies

    def _stretch_low(self, frequencies: torch.Tensor) -> torch.Tensor:
        wavelengths = 2 * math.pi / frequencies
        longest = self.original_max_position / self.low_freq_factor
        shortest = self.original_max_position / self.high_freq_factor
        blend = (self.original_max_position / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        stretched = torch.where(wavelengths > longest, frequencies / self.factor, frequencies)
        blended = (1 - blend) * stretched / self.factor + blend * stretched
        between = (wavelengths >= shortest) & (wavelengths <= longest)
        return torch.where(between, blended, stretched)


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines and sines of one step's positions."""

    cos: torch.Tensor
    """(T, 1, R): the second half of the features repeats the first."""
    sin: torch.Tensor
    """(T, 1, R / 2)."""


class RotaryEmbedding:
    """Turns positions into angles. Not a module: its frequencies stay float32 whatever the model's dtype."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.frequencies = config.inverse_frequencies(head_dim).to(device)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> Angles:
        """positions (T) int64 -> angles shared by all layers of the step."""
        angles = positions[:, None].float() * self.frequencies
        cos = angles.cos().to(dtype)
        return Angles(
            cos=torch.cat((cos, cos), dim=-1)[:, None], sin=angles.sin().to(dtype)[:, None]
        )


def rotate_(x: torch.Tensor, angles: Angles, workspace: Workspace) -> None:
    """Rotate the first R features of x (T, H, D), of any strides, in place.

    Products and sums are rounded one by one, as the reference models do, so bfloat16 agrees bit for bit.
    """
    x = x[..., : angles.cos.shape[-1]]
    half = x.shape[-1] // 2
    swapped = workspace.take("rotary", tuple(x.shape))
    torch.mul(x[..., half:], angles.sin, out=swapped[..., :half])
    torch.mul(x[..., :half], angles.sin, out=swapped[..., half:])
    x.mul_(angles.cos)
    x[..., :half].sub_(swapped[..., :half])
    x[..., half:].add_(swapped[..., half:])
