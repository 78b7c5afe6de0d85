"""Tensors that come again are looked at in one call: whatever is another than the last time is seen."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sync_support import ToyEngine, weights

import weight_sync
from weight_sync import ManifestMismatch, WeightPublisher
from weight_sync.publisher import same_layouts, selection
from weight_sync.publisher.endpoint import PackedArena
from weight_sync.publisher.same_layouts import guard_of
from weight_sync.publisher.selection import Layout, Selection, Selector


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shape": lambda t: t[:-1],
    "rank": lambda t: t[None],
    "strides": transposed,
    "step": lambda t: torch.stack([t, t], -1)[..., 0],
    "dtype": lambda t: t.double(),
    "bits of the same size": lambda t: t.view(torch.int32),
    "no data": lambda t: t.to("meta"),
    "layout": lambda t: t.to_sparse(),
    "type": torch.nn.Parameter,
    "conjugate": lambda t: torch.complex(t, t).conj(),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_guard_sees_every_difference_but_addresses_and_values(what: str) -> None:
    tensors = [torch.randn(4, 4), torch.randn(4, 4)]
    guard = guard_of(tensors)
    assert guard is not None, "this torch has none: look at `same_layouts`"
    assert guard(torch.zeros(4, 4), torch.ones(4, 4))
    assert not guard(torch.zeros(4, 4), OTHERS[what](torch.ones(4, 4)))


def test_a_guard_keeps_no_tensor() -> None:
    tensor = torch.zeros(3)
    gone = weakref.ref(tensor)
    guard = guard_of([tensor])
    del tensor
    gc.collect()
    assert guard is not None and gone() is None


@pytest.mark.parametrize("at_once", [2, 256])
@pytest.mark.parametrize("has_guards", [True, False])
def test_what_changed_in_place_is_seen_by_the_next_update(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch, has_guards: bool, at_once: int
) -> None:
    """The same objects, with other contents: `.data` and in-place views make anything of a tensor."""
    monkeypatch.setattr(selection, "_AT_ONCE", at_once)
    if not has_guards:
        monkeypatch.setattr(selection, "guard_of", lambda tensors: None)
    with WeightPublisher(engine) as publisher:
        tensors = weights(1.0)
        for value in (1.0, 2.0, 3.0):
            for tensor in tensors.values():
                tensor.fill_(value)
            publisher.publish(tensors)
            assert engine.values() == {value}
        name = "layers.0.q.weight"
        new = torch.randn(16, 16).bfloat16()
        tensors[name].data = transposed(new)
        engine.host.look_away()
        assert publisher.publish(tensors).fingerprint == weight_sync.fingerprint(tensors)
        assert torch.equal(engine.weight_map.parameters["qkv"][:16], new)
        tensors[name].t_()
        assert publisher.publish(tensors).fingerprint == weight_sync.fingerprint(tensors)
        tensors[name].data = new.float()
        assert [cast[0] for cast in publisher.publish(tensors).casts] == [name]
        tensors[name].data = new[:8]
        with pytest.raises(ManifestMismatch, match=r"layers.0.q.weight: got shape \[8, 16\]"):
            publisher.publish(tensors)
        tensors[name].data = new
        publisher.publish(dict(reversed(tensors.items())))
        report = publisher.publish(dict(reversed(tensors.items())))
        assert report.fingerprint == weight_sync.fingerprint(tensors)


@pytest.mark.parametrize("number", range(7))
def test_layouts_are_the_same_object_only_while_no_tensor_is_laid_out_in_another_way(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A packer believes it without a look of its own. Parts of four: each place in a part, and in the next one."""
    monkeypatch.setattr(selection, "_AT_ONCE", 4)
    layout = Layout(engine.receiver.info(), 1 << 20)

    def chosen(tensors: dict[str, torch.Tensor]) -> Selection:
        selector = Selector(
            layout,
            cast=True,
            packed=lambda row: torch.empty(0),
            ignored=lambda names: frozenset(),
        )
        found = selector.take(tensors.items())
        selector.finish(strict=True)
        rows, sources = found.as_given()
        assert found.in_order()[0].tolist() == sorted(rows)
        names = [meta.name for meta in layout.manifest.tensors]
        wanted = [tensors[names[row]].data_ptr() for row in rows]
        addresses = [source.data_ptr() for source in sources]
        assert addresses == wanted
        assert found.addresses is None or found.addresses.tolist() == wanted
        return found

    tensors = dict(reversed(weights(1.0).items()))
    assert chosen(tensors).layouts is None, "looked at one by one"
    first = chosen(tensors).layouts
    assert first is not None and chosen(dict(reversed(weights(2.0).items()))).layouts is first
    name = [name for name, tensor in tensors.items() if tensor.numel() > 1][number]
    whole = tensors[name]
    tensors[name] = torch.stack([whole, whole], -1)[..., 0]
    second = chosen(tensors).layouts
    assert second is not None and second is not first
    assert chosen(tensors).layouts is second
    tensors[name] = whole
    assert chosen(tensors).layouts not in (first, second)


class Packer:
    """Stands for a GPU's: packs with torch, and remembers what it was told before."""

    def __init__(self, arena: PackedArena) -> None:
        self.arena = arena
        self.told: list[tuple[int, object]] = []
        self.waits = 0
        self.begun_at: float | None = None

    def pack_ahead(
        self,
        sources: list[torch.Tensor],
        addresses: np.ndarray[Any, Any],
        num_known: int,
        layouts: object,
        *,
        check_finite: bool,
    ) -> None:
        assert addresses[:num_known].tolist() == [t.data_ptr() for t in sources[:num_known]]
        self.told.append((num_known, layouts))

    def pack(
        self, rows: np.ndarray[Any, Any], sources: list[torch.Tensor], **options: Any
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        for row, source in zip(rows, sources, strict=True):
            self.arena.views[row].copy_(source)
        values = self.arena.fingerprints.values(self.arena.buffer, rows)
        return values.numpy().view(np.uint64), np.sort(rows)

    def wait(self) -> None:
        self.waits += 1


def test_a_gpu_is_told_of_what_is_as_before_while_the_rest_is_looked_at(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_AT_ONCE", 4)
    engine.host.look_away()
    with WeightPublisher(engine) as publisher:
        publisher.publish(weights(0.0))
        arena = publisher._endpoint._packed
        assert arena is not None
        packer = Packer(arena)
        arena.packer = packer  # type: ignore[assignment]
        tensors = dict(reversed(weights(1.0).items()))
        assert publisher.publish(tensors).fingerprint == weight_sync.fingerprint(tensors)
        assert packer.told == [], "other names in these places"
        tensors = dict(reversed(weights(2.0).items()))
        assert publisher.publish(tensors).fingerprint == weight_sync.fingerprint(tensors)
        (_, same), *_ = packer.told
        assert same is not None and packer.told == [(4, same), (8, same), (9, same)]
        name = list(tensors)[5]
        packer.told.clear()
        tensors[name] = tensors[name].t().contiguous().t()
        assert publisher.publish(tensors).fingerprint == weight_sync.fingerprint(tensors)
        assert packer.told == [(4, same), (8, None), (9, None)]
        packer.told.clear()
        with pytest.raises(ManifestMismatch):
            publisher.publish({**tensors, name: tensors[name][:-1]})
        assert [num for num, _ in packer.told] == [4] and packer.waits == 1
        assert publisher.publish(tensors).fingerprint == weight_sync.fingerprint(tensors)


def test_a_torch_that_answers_wrongly_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._C._dynamo.guards as guards

    class Blind:
        def __init__(self, *tensors: torch.Tensor, **options: Any) -> None: ...

        def check(self, *tensors: torch.Tensor) -> bool:
            return True

    monkeypatch.setattr(guards, "TensorGuards", Blind)
    same_layouts._guards.cache_clear()
    try:
        assert guard_of([torch.zeros(3)]) is None
    finally:
        same_layouts._guards.cache_clear()


def test_items_of_a_mapping_that_is_no_dict_are_taken_one_by_one_every_time(
    engine: ToyEngine,
) -> None:
    class OneAtATime(UserDict[str, torch.Tensor]):
        """What was given last is gone when the next one is asked for."""

        def __getitem__(self, name: str) -> torch.Tensor:
            if self.last is not None:
                self.last.zero_()
            self.last = super().__getitem__(name).clone()
            return self.last

        last: torch.Tensor | None = None

    with WeightPublisher(engine) as publisher:
        for value in (1.0, 2.0, 3.0):
            publisher.publish(weights(value))
            publisher.publish(OneAtATime(weights(value + 10)).items())
            assert engine.values() == {value + 10}
