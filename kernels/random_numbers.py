"""Random numbers that depend on a request's seed and a position in its output alone.

    U(seed, position) = (mix64(mix64(seed) + position) >> 11) / 2^53              in [0, 1), float64

`mix64` is SplitMix64's step, with all arithmetic modulo 2^64: the same numbers as the engine's CPU sampler draws with.
"""

from __future__ import annotations

from .launching import jit, tl


@jit
def _mix64(value):  # type: ignore[no-untyped-def]
    """splitmix64 of a uint64."""
    value = value + 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@jit
def uniform(seed, position):  # type: ignore[no-untyped-def]
    """U of the formula, for the 64 bits of a seed (int64) and an integer position."""
    mixed = _mix64(_mix64(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64))
    return (mixed >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


def reference(seed: int, position: int) -> float:
    """The formula in Python's integers."""

    def mix64(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    mixed = mix64((mix64(seed % 2**64) + position) % 2**64)
    return float((mixed >> 11) * 2.0**-53)
