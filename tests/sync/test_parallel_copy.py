"""Copies that are shared among threads do what `copy_` does, whatever the tensors are like."""

from __future__ import annotations

import pytest
import torch

from weight_sync.layout.parallel_copy import copy_tensors


def pairs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Large and small, plain and not; more than enough bytes for several threads."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    sources = [
        noise(1500, 1600, dtype=torch.bfloat16),
        noise(1021, 1031),
        noise(700, 900).t(),
        noise(300, 500, dtype=torch.bfloat16),
        torch.nn.Parameter(noise(400, 500)),
        torch.randint(-9, 9, (3, 70_001), generator=generator),
        torch.tensor(3.0),
        torch.empty(0),
        *(noise(7, i % 50 + 1) for i in range(1100)),
        *(noise(64, 64)[:, ::2] for _ in range(3)),
    ]
    destinations = [torch.full(source.shape, -1, dtype=source.dtype) for source in sources]
    destinations[3] = torch.zeros(300, 500)  # a cast
    destinations[4] = torch.zeros(500, 400).t()  # a strided destination
    return destinations, sources


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_destination_gets_its_source(threads: int) -> None:
    destinations, sources = pairs()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        copy_tensors(destinations, sources)
    finally:
        torch.set_num_threads(before)
    for destination, source in zip(destinations, sources, strict=True):
        assert torch.equal(destination, source.detach().to(destination.dtype))


def test_nothing_is_written_beside_the_destinations() -> None:
    memory = torch.zeros(40 << 20, dtype=torch.uint8)
    inside = memory[1000 : 1000 + (30 << 20)]
    copy_tensors([inside], [torch.ones_like(inside)])
    assert bool(inside.all()) and not memory[:1000].any() and not memory[1000 + (30 << 20) :].any()


def test_an_error_on_another_thread_is_raised() -> None:
    good = torch.zeros(6 << 20)
    with pytest.raises(RuntimeError):
        copy_tensors([good, torch.zeros(4, 4)], [torch.ones_like(good), torch.zeros(3, 5)])
