"""A module with adapters is published as if they were merged, and is what it was afterwards, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sync_support import ToyEngine
from torch import nn

from weight_sync.errors import ManifestMismatch
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.publisher.sources import tensors_of


class Adapter(nn.Module):
    """A linear layer with a low-rank adapter beside it, as PEFT makes them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.merged = False

    @property
    def delta(self) -> torch.Tensor:
        return self.lora_B["default"].weight @ self.lora_A["default"].weight

    def merge(self) -> None:
        self.base_layer.weight.data += self.delta.to(self.base_layer.weight.dtype)
        self.merged = True

    def unmerge(self) -> None:
        self.base_layer.weight.data -= self.delta.to(self.base_layer.weight.dtype)
        self.merged = False


class Saved(nn.Module):
    """A layer that is trained whole, as PEFT keeps it."""

    def __init__(self, layer: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        self.original_module = layer
        self.modules_to_save = nn.ModuleDict({"default": trained})


def nested(**parts: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    q = Adapter(nn.Linear(16, 16, bias=False, dtype=torch.bfloat16))
    norm = nn.LayerNorm(13, bias=False)
    layer = nested(q=q, k=nn.Linear(16, 8, bias=False, dtype=torch.bfloat16), norm=norm)
    saved = Saved(nn.Embedding(24, 16), nn.Embedding(24, 16, dtype=torch.bfloat16))
    inner = nested(layers=nn.ModuleList([layer]), embed=saved)
    return nested(base_model=nested(model=inner))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_merged_weights_arrive_under_plain_names_and_the_module_is_the_same_to_the_bit(
    engine: ToyEngine, model: nn.Module
) -> None:
    before = bits(model)
    inner = model.base_model.model
    q = inner.layers[0].q
    expected = q.base_layer.weight.detach() + q.delta.to(torch.bfloat16)
    engine.host.look_away()
    with WeightPublisher(engine, timeout_s=10) as publisher:
        report = publisher.publish(model, strict=False)
        publisher.publish(model, strict=False)
    assert report.updated == 4
    assert torch.equal(engine.weight_map.read("layers.0.q.weight"), expected)
    trained = inner.embed.modules_to_save["default"].weight
    assert torch.equal(engine.weight_map.read("embed.weight"), trained)
    assert same(bits(model), before)
    assert not q.merged


def test_it_is_the_same_after_a_publish_that_failed(engine: ToyEngine, model: nn.Module) -> None:
    before = bits(model)
    q = model.base_model.model.layers[0].q
    with (
        WeightPublisher(engine, timeout_s=10) as publisher,
        pytest.raises(ManifestMismatch) as error,
    ):
        publisher.publish(model, strict=True)  # some are missing
    assert same(bits(model), before)

    def stopped_half_way() -> Iterator[None]:
        with tensors_of(model) as tensors:
            next(iter(tensors))
            assert q.merged
            yield

    half = stopped_half_way()
    next(half)
    half.close()
    assert same(bits(model), before)
    assert not q.merged
    assert error is not None


def test_what_was_merged_before_stays_merged(engine: ToyEngine, model: nn.Module) -> None:
    q = model.base_model.model.layers[0].q
    q.merge()
    before = bits(model)
    engine.host.look_away()
    with WeightPublisher(engine, timeout_s=10) as publisher:
        publisher.publish(model, strict=False)
    assert q.merged
    assert same(bits(model), before)
    assert torch.equal(engine.weight_map.read("layers.0.q.weight"), q.base_layer.weight)
