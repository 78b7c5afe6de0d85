"""Encodings that nobody ships, over every transport: no transport knows how tensors are written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sync_support import ToyEngine, one_by_one, weights

import weight_sync
from weight_sync import WeightPublisher
from weight_sync.errors import FingerprintMismatch, ProtocolError
from weight_sync.layout import region as regions
from weight_sync.layout.encoding import Encoding
from weight_sync.layout.manifest import Manifest, TensorMeta
from weight_sync.layout.tensor_sums import tensor_fingerprint
from weight_sync.layout.weight_map import Placement, WeightMap
from weight_sync.plan.copies import Copy, Indices, Occupied
from weight_sync.plan.plan import compile_plan
from weight_sync.receiver import service

WORDS = {2: torch.int16, 4: torch.int32}


def words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(WORDS[tensor.element_size()])


def values_of(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    return np.array([tensor_fingerprint(tensor) for tensor in tensors], dtype=np.uint64)


class EachRow:
    """A decoder that takes the rows of a plan one by one."""

    def __init__(
        self,
        manifest: Manifest,
        copies: Sequence[Copy],
        decode: Callable[[torch.Tensor, Copy], torch.Tensor],
    ) -> None:
        self.manifest, self.copies, self.decode = manifest, copies, decode

    def run(self, stage: torch.Tensor, present: Indices | None) -> None:
        wanted = None if present is None else set(np.asarray(present).tolist())
        for copy in self.copies:
            if wanted is None or copy.index in wanted:
                copy.destination.copy_(self.decode(self.manifest.view(stage, copy.index), copy))


class Difference:
    """Which bits change: the exclusive or with what the trainer sent last, of the same size, as integers."""

    name, verbatim = "difference", False

    def __init__(self, base: dict[str, torch.Tensor]) -> None:
        self.base = {name: tensor.clone() for name, tensor in base.items()}

    def carried(self, meta: TensorMeta) -> TensorMeta:
        return replace(meta, dtype=WORDS[meta.dtype.itemsize])

    def encode(
        self,
        manifest: Manifest,
        rows: Sequence[int],
        sources: Sequence[torch.Tensor],
        arena: Sequence[torch.Tensor],
    ) -> np.ndarray:
        held = []
        for row, source, to in zip(rows, sources, arena, strict=True):
            meta = manifest.tensors[row]
            held.append(source.detach().to(meta.dtype).contiguous())
            to.copy_(words(held[-1]) ^ words(self.base[meta.name]))
            self.base[meta.name] = held[-1].clone()
        return values_of(held)

    def decoder(self, manifest: Manifest, copies: Sequence[Copy], occupied: Occupied) -> EachRow:
        def decode(carried: torch.Tensor, copy: Copy) -> torch.Tensor:
            changed = regions.part(carried, copy.region) ^ words(copy.resident)
            return changed.view(copy.destination.dtype)

        return EachRow(manifest, copies, decode)


class OneValue:
    """Tensors of one value each, and that value is all that travels: another shape, and less of it."""

    name, verbatim = "one_value", False

    def carried(self, meta: TensorMeta) -> TensorMeta:
        return replace(meta, shape=())

    def encode(
        self,
        manifest: Manifest,
        rows: Sequence[int],
        sources: Sequence[torch.Tensor],
        arena: Sequence[torch.Tensor],
    ) -> np.ndarray:
        for source, to in zip(sources, arena, strict=True):
            to.fill_(source.flatten()[0] if source.numel() else 0)
        held = zip(rows, sources, strict=True)
        return values_of([source.to(manifest.tensors[row].dtype) for row, source in held])

    def decoder(self, manifest: Manifest, copies: Sequence[Copy], occupied: Occupied) -> EachRow:
        return EachRow(manifest, copies, lambda carried, copy: carried)


ENCODINGS: dict[str, Callable[[], Encoding]] = {
    "difference": lambda: Difference(weights(0.0)),
    "one_value": OneValue,
}


@pytest.fixture(params=ENCODINGS)
def encoding(request: pytest.FixtureRequest) -> Encoding:
    return ENCODINGS[request.param]()


def publisher_of(engine: ToyEngine, encoding: Encoding, transport: str) -> WeightPublisher:
    publisher = WeightPublisher(engine, timeout_s=20, bucket_bytes=600, transport=transport)  # type: ignore[arg-type]
    publisher._endpoint._encoding = encoding
    return publisher


@pytest.fixture(params=["local", "shared_memory", "uploaded", "process_group"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "uploaded":  # as for parameters on a GPU
        monkeypatch.setattr(service, "needs_upload", lambda device: True)
        return "shared_memory"
    return str(request.param)


@pytest.fixture
def publisher(
    make_engine: Callable[..., ToyEngine], encoding: Encoding, transport: str
) -> Iterator[tuple[ToyEngine, WeightPublisher]]:
    engine = make_engine(encodings=(encoding,))
    with publisher_of(engine, encoding, transport) as publisher:
        yield engine, publisher


def test_tensors_arrive_however_they_were_written_down(
    publisher: tuple[ToyEngine, WeightPublisher],
) -> None:
    engine, trainer = publisher
    for version in range(1, 4):
        tensors = weights(float(version))
        report = trainer.publish(one_by_one(tensors) if version == 2 else tensors)
        assert report.complete and engine.values() == {float(version)}
        assert report.fingerprint == weight_sync.fingerprint(tensors)
    engine.host.look_away()
    assert trainer.publish({"norm.weight": torch.full((7,), 9.0)}, strict=False).updated == 1
    assert engine.values() == {3.0, 9.0}


def test_what_travels_has_the_size_that_the_encoding_gives_it(
    publisher: tuple[ToyEngine, WeightPublisher], encoding: Encoding
) -> None:
    _, trainer = publisher
    tensors = weights(2.0)
    size = sum(
        encoding.carried(TensorMeta.of(name, tensor)).num_bytes for name, tensor in tensors.items()
    )
    assert trainer.publish(tensors).num_bytes == size


def test_a_difference_to_other_weights_than_those_that_serve_is_undone(
    make_engine: Callable[..., ToyEngine], transport: str
) -> None:
    encoding = Difference(weights(5.0))
    engine = make_engine(encodings=(encoding,), keep_previous=True)
    with publisher_of(engine, encoding, transport) as publisher:
        with pytest.raises(FingerprintMismatch, match="resident bytes"):
            publisher.publish(weights(1.0))
        assert engine.values() == {0.0} and engine.receiver.torn is None
        encoding.base = weights(0.0)
        publisher.publish(weights(1.0))
    assert engine.values() == {1.0}


def test_an_engine_refuses_an_encoding_that_it_does_not_know(engine: ToyEngine) -> None:
    with publisher_of(engine, OneValue(), "shared_memory") as publisher:
        with pytest.raises(ProtocolError, match="got 'one_value', expected one of full"):
            publisher.publish(weights(1.0))
    assert engine.values() == {0.0}


def test_ranks_decode_their_parts_alone() -> None:
    old, new = (torch.randn(8, 6) for _ in range(2))
    meta = TensorMeta(name="w", shape=(8, 6), dtype=torch.float32)
    encoding = Difference({"w": old})
    manifest = Manifest(tensors=(encoding.carried(meta),), bucket_bytes=1 << 20)
    arena = torch.zeros(manifest.arena_bytes, dtype=torch.uint8)
    model = Manifest(tensors=(meta,), bucket_bytes=1 << 20)
    declared = encoding.encode(model, [0], [new], manifest.views(arena))
    found = np.zeros(1, dtype=np.uint64)
    for region in (((0, 5), (0, 6)), ((5, 8), (0, 2)), ((5, 8), (2, 6))):
        held = regions.part(old, region).clone()
        placement = Placement(name="w", shape=(8, 6), region=region, destination=held)
        plan = compile_plan(manifest, WeightMap([placement], {"w": held}), encoding)
        plan.replay(arena)
        assert torch.equal(held, regions.part(new, region))
        found += plan.resident_fingerprints().numpy().view(np.uint64)
    assert found == declared
