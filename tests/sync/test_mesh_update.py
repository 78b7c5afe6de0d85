"""The call that every rank of a trainer makes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import weight_sync


class Recorder:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def update_weights_from_tensor(self, named_tensors: Any) -> str:
        self.got.append(named_tensors)
        return "report"


class AsyncRecorder(Recorder):
    async def async_update_weights_from_tensor(self, named_tensors: Any) -> str:
        return self.update_weights_from_tensor(named_tensors) + " awaited"


class Mesh:
    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def __getitem__(self, key: str) -> Mesh:
        return Mesh(**{key: self.sizes[key]})

    def size(self) -> int:
        return int(torch.tensor(list(self.sizes.values())).prod())


PAIRS = [("a", torch.zeros(1)), ("b", torch.ones(2))]


@pytest.mark.parametrize("mesh", [None, Mesh(tp=1), Mesh(tp=1, dp=1)])
@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_a_single_rank_passes_its_tensors_on(mesh: Any, load_format: str | None) -> None:
    for engine, answer in ((Recorder(), "report"), (AsyncRecorder(), "report awaited")):
        call = weight_sync.update_weights(engine, iter(PAIRS), "tp", mesh, load_format=load_format)
        assert asyncio.run(call) == answer  # type: ignore[comparison-overlap]
        assert engine.got == [PAIRS]


def test_unknown_formats_are_refused() -> None:
    engine = Recorder()
    with pytest.raises(ValueError, match="load_format: got 'pickle'"):
        asyncio.run(weight_sync.update_weights(engine, PAIRS, None, None, load_format="pickle"))
    assert engine.got == []
