"""Fingerprints of tensors and models: the same on both sides, and different when anything is."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import weight_sync
from rollout_kernels.fingerprint import reference
from weight_sync.errors import ManifestMismatch
from weight_sync.layout import fingerprints
from weight_sync.layout.fingerprints import ArenaFingerprints, fingerprint
from weight_sync.layout.manifest import Manifest, TensorMeta
from weight_sync.layout.tensor_sums import combine, name_key, tensor_fingerprint, unsigned

DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.float64, torch.bool]


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


class Tied(nn.Module):
    """An embedding, a layer, and a head that is the embedding."""

    def __init__(self, *, num_layers: int = 2, view: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(13, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(num_layers))
        self.lm_head = nn.Linear(5, 13, bias=False)
        weight = self.embed_tokens.weight
        self.lm_head.weight = nn.Parameter(weight.data) if view else weight


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=3).map(tuple), st.sampled_from(DTYPES), st.integers(0, 99)
)
def test_a_tensor_s_fingerprint_is_that_of_its_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    tensor = noise(shape, dtype, seed)
    expected = reference(tensor.contiguous().view(-1).view(torch.uint8))
    assert tensor_fingerprint(tensor) == expected
    if tensor.dim() == 2:
        assert tensor_fingerprint(tensor.t().contiguous().t()) == expected


@pytest.mark.parametrize("shape", [(3, 5), (1101, 301)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_what_stands_for_its_negative_or_conjugate_counts_as_what_it_is(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape, dtype=dtype)
    stands = torch._neg_view(tensor) if dtype is torch.float32 else tensor.conj()
    assert stands.is_neg() or stands.is_conj()
    real = stands.resolve_neg().resolve_conj()
    assert tensor_fingerprint(stands) == tensor_fingerprint(real) != tensor_fingerprint(tensor)
    assert fingerprint({"a": stands}) == fingerprint({"a": real})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_the_parts_of_any_split_add_up_to_the_whole(
    shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = noise(shape, dtype, seed=sum(shape))
    cuts = []
    for size in shape:
        inner = data.draw(st.lists(st.integers(0, size), max_size=2))
        bounds = sorted({0, size, *inner})
        cuts.append(list(itertools.pairwise(bounds)))
    total = 0
    for region in itertools.product(*cuts):
        part = tensor[tuple(slice(*r) for r in region)]
        total += tensor_fingerprint(part, shape=shape, region=region)
    assert total % 2**64 == tensor_fingerprint(tensor)


def test_swapped_shards_are_caught() -> None:
    tensor = noise((8, 64), torch.bfloat16)
    for dim in (0, 1):
        first, second = tensor.chunk(2, dim)
        whole = tensor_fingerprint(torch.cat([first, second], dim))
        assert tensor_fingerprint(torch.cat([second, first], dim)) != whole


def test_a_shard_of_another_shape_than_its_region_is_refused() -> None:
    with pytest.raises(ManifestMismatch, match=r"got shape \[2, 3\]"):
        tensor_fingerprint(torch.zeros(2, 3), shape=(4, 3), region=((0, 3), (0, 3)))


def test_a_model_is_its_unique_parameters_by_their_first_names() -> None:
    for view in (False, True):
        model = Tied(view=view)
        assert ("lm_head.weight" in dict(model.named_parameters())) == view
        names = [name for name in dict(model.named_parameters()) if name != "lm_head.weight"]
        values = [tensor_fingerprint(model.get_parameter(name)) for name in names]
        assert fingerprint(model) == combine(names, values)


def test_sources_of_every_kind_agree() -> None:
    named = dict(Tied().named_parameters())
    expected = fingerprint(named)
    assert fingerprint(list(named.items())) == expected
    assert fingerprint(reversed(list(named.items()))) == expected
    assert fingerprint(Tied()) == expected
    assert fingerprint({}) == 0


def test_an_iterator_may_reuse_one_buffer() -> None:
    values = [noise((50,), torch.float32, seed=i) for i in range(4)]

    def reuse():
        buffer = torch.zeros(50)
        for i, value in enumerate(values):
            buffer.copy_(value)
            yield f"t{i}", buffer

    assert fingerprint(reuse()) == fingerprint({f"t{i}": v for i, v in enumerate(values)})


def test_large_and_small_tensors_and_more_than_one_batch_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {f"t{i}": noise((i * 700 + 1, 9), torch.float32, seed=i) for i in range(8)}
    expected = combine(named, [tensor_fingerprint(value) for value in named.values()])
    for batch, direct in ((1 << 30, 1 << 30), (1 << 16, 1 << 30), (1 << 16, 1 << 15), (1, 1)):
        monkeypatch.setattr("weight_sync.layout.fingerprints._BATCH_BYTES", batch)
        monkeypatch.setattr("weight_sync.layout.fingerprints._DIRECT_BYTES", direct)
        assert fingerprint(named) == expected


@pytest.mark.parametrize("on_gpu", [[], [1], [0, 3], [3, 1], [0, 1, 2, 3]])
def test_tensors_of_gpus_and_others_add_up(
    monkeypatch: pytest.MonkeyPatch, on_gpu: list[int]
) -> None:
    named = {name: noise((5, 9), torch.float32, i) for i, name in enumerate("abcd")}
    dtypes = {"b": torch.bfloat16, "c": torch.bfloat16}
    expected = fingerprint(named, dtypes=dtypes)

    def sums(tensors: list[torch.Tensor], held: list[torch.dtype]) -> tuple[np.ndarray, np.ndarray]:
        values = [tensor_fingerprint(tensors[i].to(held[i])) for i in on_gpu]
        return np.array(on_gpu, dtype=np.int64), np.array(values, dtype=np.uint64)

    monkeypatch.setattr(fingerprints, "device_sums", sums)
    assert fingerprint(named, dtypes=dtypes) == expected
    assert fingerprint(list(named.items()), dtypes=dtypes) == expected


def test_values_are_converted_to_the_dtype_that_the_engine_holds() -> None:
    named = dict(Tied().named_parameters())
    cast = {name: value.to(torch.bfloat16) for name, value in named.items()}
    assert fingerprint(named, dtypes=torch.bfloat16) == fingerprint(cast) != fingerprint(named)
    one = {**named, "layers.0.weight": cast["layers.0.weight"]}
    assert fingerprint(named, dtypes={"layers.0.weight": torch.bfloat16}) == fingerprint(one)
    integers = {"steps": torch.arange(5)}
    assert fingerprint(integers, dtypes=torch.bfloat16) == fingerprint(integers)


def test_names_that_change_places_change_the_value() -> None:
    a, b = noise((9,), torch.float32, 1), noise((9,), torch.float32, 2)
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": a, "c": b})
    assert name_key("a") % 2 == 1


def test_ranks_that_hold_shards_add_up_to_the_model() -> None:
    named = {"a": noise((6, 5), torch.bfloat16, 1), "b": noise((7,), torch.float32, 2)}
    ranks = [
        combine(
            named, [tensor_fingerprint(v[half], shape=v.shape, region=r) for v, half, r in rows]
        )
        for rows in (
            [
                (named["a"], slice(0, 3), ((0, 3), (0, 5))),
                (named["b"], slice(0, 4), ((0, 4),)),
            ],
            [
                (named["a"], slice(3, 6), ((3, 6), (0, 5))),
                (named["b"], slice(4, 7), ((4, 7),)),
            ],
        )
    ]
    assert sum(ranks) % 2**64 == fingerprint(named)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.data())
def test_one_flipped_bit_shows_in_the_tensor_that_it_is_in(which: int, data: st.DataObject) -> None:
    metas = tuple(
        TensorMeta(name=f"t{i}", shape=(i * 37 + 3,), dtype=torch.bfloat16) for i in range(5)
    )
    manifest = Manifest(tensors=metas, bucket_bytes=1)
    buffer = noise((manifest.arena_bytes,), torch.uint8)
    values = ArenaFingerprints(manifest).values(buffer)
    at = data.draw(st.integers(0, metas[which].num_bytes - 1))
    buffer[manifest.offsets[which] + at] ^= 1 << data.draw(st.integers(0, 7))
    differs = ArenaFingerprints(manifest).values(buffer) != values
    assert differs.tolist() == [i == which for i in range(5)]


def test_many_different_subsets_stay_right_when_their_tables_are_dropped() -> None:
    metas = tuple(TensorMeta(name=f"t{i}", shape=(300,), dtype=torch.int8) for i in range(12))
    manifest = Manifest(tensors=metas, bucket_bytes=1)
    buffer = noise((manifest.arena_bytes,), torch.uint8)
    arena = ArenaFingerprints(manifest)
    values = arena.values(buffer).tolist()
    for _ in range(2):
        for subset in itertools.combinations(range(12), 6):
            if sum(subset) % 5 == 0:
                assert arena.values(buffer, subset).tolist() == [values[i] for i in subset]
    tables = arena._tables[torch.device("cpu")]
    assert tables._cached_bytes <= 4 * manifest.num_bytes
    assert len(tables._some) == 8


def test_the_public_name_is_the_function() -> None:
    # A module of that name would hide it.
    importlib.import_module("weight_sync.layout.fingerprints")
    model = Tied()
    assert weight_sync.fingerprint(model) == fingerprint(model)
    assert unsigned(-1) == 2**64 - 1
