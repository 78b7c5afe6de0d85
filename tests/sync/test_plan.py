"""The compiled plan: what it writes, in how many copies, and what both ends' fingerprints say."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_sync.errors import ManifestMismatch
from weight_sync.layout.manifest import Manifest, TensorMeta
from weight_sync.layout.memory import joined
from weight_sync.layout.tensor_sums import tensor_fingerprint, unsigned
from weight_sync.layout.weight_map import Placement, WeightMap
from weight_sync.plan.copies import Replay
from weight_sync.plan.plan import Plan, compile_plan


def noise(manifest: Manifest, seed: int = 0) -> torch.Tensor:
    """An arena of random bytes, padding included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (manifest.arena_bytes,), dtype=torch.uint8, generator=generator)


def arena_model(metas: list[TensorMeta]) -> tuple[WeightMap, torch.Tensor]:
    """A model whose parameters lie in one buffer, as an arena would; and the buffer."""
    layout = Manifest(tensors=tuple(metas), bucket_bytes=1 << 20)
    buffer = torch.zeros(layout.arena_bytes, dtype=torch.uint8)
    parameters = {meta.name: layout.view(buffer, i) for i, meta in enumerate(metas)}
    placements = [Placement.whole(name, value) for name, value in parameters.items()]
    return WeightMap(placements, parameters), buffer


def manifest_of(weight_map: WeightMap, names: list[str] | None = None) -> Manifest:
    metas = {meta.name: meta for meta in weight_map.metas()}
    chosen = metas.values() if names is None else [weight_map.locate(n).meta for n in names]
    return Manifest(tensors=tuple(chosen), bucket_bytes=1 << 20)


def summary_of(plan: Plan) -> SimpleNamespace:
    """Rows before neighbours are joined; plain and strided copies of all; parts whose fingerprint is the slow way."""
    replay = plan._decoder
    assert isinstance(replay, Replay)
    return SimpleNamespace(
        num_rows=len(replay._ranges) + len(replay._strided),
        num_copies=len(replay._all.targets),
        num_strided=len(replay._strided),
        num_exact=len(plan._resident._exact),
    )


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def check_written(plan: Plan, weight_map: WeightMap, stage: torch.Tensor) -> None:
    """Every tensor of the manifest is resident, and both ends' fingerprints are the tensors' own."""
    values = [tensor_fingerprint(view) for view in plan.manifest.views(stage)]
    for meta, view in zip(plan.manifest.tensors, plan.manifest.views(stage), strict=True):
        assert same_bytes(weight_map.read(meta.name), view), meta
    assert [unsigned(v) for v in plan.staged_fingerprints(stage)] == values
    assert [unsigned(v) for v in plan.resident_fingerprints()] == values


def test_equal_layouts_are_one_copy_whatever_the_number_of_tensors() -> None:
    sizes = [1, 64, 100, 257, 4096]
    metas = [
        TensorMeta(name=f"t{i}", shape=(sizes[i % 5], i % 7 + 1), dtype=torch.bfloat16)
        for i in range(200)
    ]
    weight_map, _ = arena_model(metas)
    plan = compile_plan(manifest_of(weight_map), weight_map)
    summary = summary_of(plan)
    assert (summary.num_rows, summary.num_copies, summary.num_strided) == (200, 1, 0)
    assert summary.num_exact == 0
    stage = noise(plan.manifest)
    plan.replay(stage)
    check_written(plan, weight_map, stage)


def test_another_order_is_more_copies_and_the_same_bytes() -> None:
    metas = [TensorMeta(name=f"t{i}", shape=(i + 1, 33), dtype=torch.float32) for i in range(10)]
    weight_map, _ = arena_model(metas)
    plan = compile_plan(manifest_of(weight_map, [f"t{i}" for i in (5, 6, 7, 0, 1, 9)]), weight_map)
    assert summary_of(plan).num_copies == 3
    stage = noise(plan.manifest)
    plan.replay(stage)
    check_written(plan, weight_map, stage)


kinds = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), min_size=1, max_size=2).map(tuple),
        st.sampled_from([torch.bfloat16, torch.float32, torch.int8]),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(kinds, st.randoms(use_true_random=False), st.booleans())
def test_any_order_and_any_subset_is_written_and_nothing_else(
    shapes: list[tuple[tuple[int, ...], torch.dtype]], random: object, whole: bool
) -> None:
    metas = [
        TensorMeta(name=f"t{i}", shape=shape, dtype=dtype)
        for i, (shape, dtype) in enumerate(shapes)
    ]
    weight_map, buffer = arena_model(metas)
    buffer.copy_(torch.arange(len(buffer)))
    before = {meta.name: weight_map.read(meta.name) for meta in metas}
    names = [meta.name for meta in metas]
    random.shuffle(names)
    plan = compile_plan(manifest_of(weight_map, names[: random.randint(1, len(names))]), weight_map)
    stage = noise(plan.manifest)
    num = len(plan.manifest.tensors)
    present = list(range(num)) if whole else random.sample(range(num), random.randint(0, num))
    plan.replay(stage, None if whole else np.array(present, dtype=np.uint32))
    written = {plan.manifest.tensors[i].name: plan.manifest.view(stage, i) for i in present}
    for name, old in before.items():
        assert same_bytes(weight_map.read(name), written.get(name, old)), name
    values = [tensor_fingerprint(plan.manifest.view(stage, i)) for i in present]
    assert [unsigned(v) for v in plan.staged_fingerprints(stage, present)] == values
    assert [unsigned(v) for v in plan.resident_fingerprints(present)] == values


def test_fingerprints_come_in_the_order_of_the_indices() -> None:
    metas = [TensorMeta(name=f"t{i}", shape=(50 + i,), dtype=torch.float32) for i in range(6)]
    weight_map, _ = arena_model(metas)
    plan = compile_plan(manifest_of(weight_map), weight_map)
    stage = noise(plan.manifest)
    plan.replay(stage)
    values = plan.staged_fingerprints(stage).tolist()
    for indices in ([4, 0, 3], [3, 3], np.array([5, 1], dtype=np.uint32), range(6), []):
        expected = [values[i] for i in indices]
        assert plan.staged_fingerprints(stage, indices).tolist() == expected
        assert plan.resident_fingerprints(indices).tolist() == expected


def fused_model(hidden: int, rows: tuple[int, ...]) -> tuple[WeightMap, dict[str, torch.Tensor]]:
    """Components joined in one parameter without padding, as a weight and a bias, and a tied head."""
    total = sum(rows)
    parameters = {
        "embed": torch.zeros(11, hidden, dtype=torch.bfloat16),
        "qkv.weight": torch.zeros(total, hidden, dtype=torch.bfloat16),
        "qkv.bias": torch.zeros(total, dtype=torch.bfloat16),
    }
    placements = [Placement.whole("embed", parameters["embed"])]
    fused = {}
    for kind in ("weight", "bias"):
        parts = parameters[f"qkv.{kind}"].split(rows)
        placements += [Placement.whole(f"{i}.{kind}", part) for i, part in enumerate(parts)]
        fused[f"qkv.{kind}"] = tuple(f"{i}.{kind}" for i in range(len(rows)))
    return WeightMap(placements, parameters, aliases={"head": "embed"}, fused=fused), parameters


@pytest.mark.parametrize("hidden", [128, 64, 5, 1])
@pytest.mark.parametrize("rows", [(4, 2, 2), (3, 1, 1), (1, 1, 1)])
def test_components_of_fused_parameters_have_their_own_fingerprints(
    hidden: int, rows: tuple[int, ...]
) -> None:
    weight_map, _ = fused_model(hidden, rows)
    plan = compile_plan(manifest_of(weight_map), weight_map)
    stage = noise(plan.manifest)
    plan.replay(stage)
    check_written(plan, weight_map, stage)


def test_a_component_that_was_not_sent_is_not_overwritten_by_padding() -> None:
    # q ends at byte 100, k fills the rest of its 256 bytes, v starts where an arena would put it too.
    parameter = torch.zeros(300, dtype=torch.uint8)
    q, k, v = parameter[:100], parameter[100:256], parameter[256:]
    weight_map = WeightMap(
        [Placement.whole("q", q), Placement.whole("k", k), Placement.whole("v", v)],
        {"qkv": parameter},
    )
    k.fill_(7)
    plan = compile_plan(manifest_of(weight_map, ["q", "v"]), weight_map)
    stage = noise(plan.manifest)
    plan.replay(stage)
    assert k.tolist() == [7] * 156
    check_written(plan, weight_map, stage)


def test_memory_between_parameters_that_is_no_padding_is_not_overwritten() -> None:
    # The same distance as in the arena, but not where an arena's padding would be.
    memory = torch.full((1000,), 7, dtype=torch.uint8)
    parameters = {"a": memory[8:108], "b": memory[264:364]}
    weight_map = WeightMap([Placement.whole(n, p) for n, p in parameters.items()], parameters)
    plan = compile_plan(manifest_of(weight_map), weight_map)
    stage = noise(plan.manifest)
    plan.replay(stage)
    assert set(memory[108:264].tolist()) == {7}
    check_written(plan, weight_map, stage)


def test_aliases_and_fused_names_are_written_to_where_they_stand_for() -> None:
    weight_map, parameters = fused_model(5, (3, 1, 1))
    plan = compile_plan(manifest_of(weight_map, ["qkv.weight", "head", "1.bias"]), weight_map)
    stage = noise(plan.manifest)
    plan.replay(stage)
    check_written(plan, weight_map, stage)
    assert same_bytes(parameters["qkv.weight"], plan.manifest.view(stage, 0))
    assert same_bytes(parameters["embed"], plan.manifest.view(stage, 1))


def sharded(tensor: torch.Tensor, dim: int, ranks: int) -> list[tuple[WeightMap, torch.Tensor]]:
    """One weight map per tensor-parallel rank, each with its shard of `tensor` in its own memory."""
    result = []
    sizes = [len(part) for part in torch.arange(tensor.shape[dim]).tensor_split(ranks)]
    start = 0
    for size in sizes:
        region = [(0, n) for n in tensor.shape]
        region[dim] = (start, start + size)
        shape = list(tensor.shape)
        shape[dim] = size
        memory = torch.zeros(shape, dtype=tensor.dtype)
        placement = Placement(
            name="w", shape=tuple(tensor.shape), region=tuple(region), destination=memory
        )
        result.append((WeightMap([placement], {"w": memory}), memory))
        start += size
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.complex128]),
    st.integers(1, 4),
    st.data(),
)
def test_ranks_add_up_to_the_whole(
    shape: list[int], dtype: torch.dtype, ranks: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    meta = TensorMeta(name="w", shape=tuple(shape), dtype=dtype)
    manifest = Manifest(tensors=(meta,), bucket_bytes=1)
    stage = noise(manifest)
    tensor = manifest.view(stage, 0)
    total = 0
    for weight_map, memory in sharded(tensor, dim, ranks):
        plan = compile_plan(manifest, weight_map)
        plan.replay(stage)
        region = weight_map.placements[0].region
        part = tensor[tuple(slice(*r) for r in region)]
        assert same_bytes(memory, part)
        total += unsigned(plan.resident_fingerprints()[0])
        assert unsigned(plan.staged_fingerprints(stage)[0]) == tensor_fingerprint(tensor)
    assert total % 2**64 == tensor_fingerprint(tensor)


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_ordinary_sizes_take_the_fast_path(dim: int) -> None:
    meta = TensorMeta(name="w", shape=(64, 512), dtype=torch.bfloat16)
    manifest = Manifest(tensors=(meta,), bucket_bytes=1)
    for weight_map, _ in sharded(torch.zeros(64, 512, dtype=torch.bfloat16), dim, 2):
        plan = compile_plan(manifest, weight_map)
        assert summary_of(plan).num_exact == 0
        assert summary_of(plan).num_strided == dim


def test_strided_destinations_are_written_and_read_where_they_are() -> None:
    parameter = torch.zeros(12, 10, dtype=torch.bfloat16)
    transposed = torch.zeros(7, 9).t()
    weight_map = WeightMap(
        [
            Placement.whole("left", parameter[:, :3]),
            Placement.whole("right", parameter[:, 3:]),
            Placement.whole("transposed", transposed),
        ],
        {"p": parameter, "t": transposed},
    )
    plan = compile_plan(manifest_of(weight_map), weight_map)
    summary = summary_of(plan)
    assert (summary.num_copies, summary.num_strided, summary.num_exact) == (0, 3, 3)
    stage = noise(plan.manifest)
    plan.replay(stage)
    check_written(plan, weight_map, stage)
    plan.replay(torch.zeros_like(stage), [plan.manifest.index["left"]])
    assert parameter[:, :3].view(torch.int16).abs().sum() == 0
    assert same_bytes(weight_map.read("right"), plan.manifest.views(stage)[1])


def test_resident_fingerprints_see_damage_that_staged_ones_cannot() -> None:
    metas = [TensorMeta(name=f"t{i}", shape=(100,), dtype=torch.bfloat16) for i in range(5)]
    weight_map, buffer = arena_model(metas)
    plan = compile_plan(manifest_of(weight_map), weight_map)
    stage = noise(plan.manifest)
    plan.replay(stage)
    before = plan.resident_fingerprints()
    for at in (0, 199, 256 * 3 + 77):
        buffer[at] ^= 4
        differs = plan.resident_fingerprints() != before
        assert differs.tolist() == [i == at // 256 for i in range(5)]
        buffer[at] ^= 4
    assert torch.equal(plan.staged_fingerprints(stage), before)


def test_padding_is_not_part_of_any_fingerprint() -> None:
    metas = [TensorMeta(name=f"t{i}", shape=(i + 1, 3), dtype=torch.int8) for i in range(5)]
    weight_map, buffer = arena_model(metas)
    plan = compile_plan(manifest_of(weight_map), weight_map)
    stage = noise(plan.manifest)
    plan.replay(stage)
    staged, resident = plan.staged_fingerprints(stage), plan.resident_fingerprints()
    for meta, offset in zip(plan.manifest.tensors, plan.manifest.offsets, strict=True):
        for memory in (stage, buffer):
            memory[offset + meta.num_bytes : offset + 256] += 1
    assert torch.equal(plan.staged_fingerprints(stage), staged)
    assert torch.equal(plan.resident_fingerprints(), resident)


def test_a_stage_that_starts_after_a_header_is_read_at_its_own_offset() -> None:
    metas = [TensorMeta(name="t", shape=(100,), dtype=torch.bfloat16)]
    weight_map, _ = arena_model(metas)
    plan = compile_plan(manifest_of(weight_map), weight_map)
    stage = torch.cat([torch.zeros(256, dtype=torch.uint8), noise(plan.manifest)])[256:]
    plan.replay(stage)
    check_written(plan, weight_map, stage)


def test_parameters_keep_their_addresses_and_their_gradients_flag() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10, 10))
    weight_map = WeightMap([Placement.whole("w", parameter)], {"w": parameter})
    plan = compile_plan(manifest_of(weight_map), weight_map)
    stage = torch.zeros(plan.manifest.arena_bytes, dtype=torch.uint8)
    plan.manifest.view(stage, 0).fill_(3)
    address = parameter.data_ptr()
    plan.replay(stage)
    assert parameter.data_ptr() == address
    assert parameter.requires_grad
    assert parameter.min() == 3


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_a_model_of_inference_tensors_is_updated_from_any_mode(
    modes: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_kernels.span_table._THREADED_WORDS", 1)
    monkeypatch.setattr("rollout_kernels.span_table._JOB_WORDS", 1024)
    with torch.inference_mode(modes[0]):
        parameters = {"p": torch.zeros(40, 1000), "norm": torch.zeros(30_000)}
        left, right = parameters["p"].split([300, 700], dim=1)
        weight_map = WeightMap(
            [
                Placement.whole("left", left),
                Placement.whole("right", right),
                Placement.whole("norm", parameters["norm"]),
            ],
            parameters,
        )
        plan = compile_plan(manifest_of(weight_map), weight_map)
    for seed, mode in enumerate((*modes, *modes)):
        with torch.inference_mode(mode):
            stage = noise(plan.manifest, seed)
            plan.replay(stage)
            check_written(plan, weight_map, stage)


def test_everything_that_does_not_fit_is_one_error() -> None:
    weight_map, _ = fused_model(8, (4, 2, 2))
    metas = (
        TensorMeta(name="unknown", shape=(1,), dtype=torch.float32),
        TensorMeta(name="embed", shape=(11, 9), dtype=torch.bfloat16),
        TensorMeta(name="head", shape=(11, 8), dtype=torch.bfloat16),
        TensorMeta(name="0.weight", shape=(4, 8), dtype=torch.float32),
        TensorMeta(name="qkv.weight", shape=(8, 8), dtype=torch.bfloat16),
    )
    with pytest.raises(ManifestMismatch) as caught:
        compile_plan(Manifest(tensors=metas, bucket_bytes=1), weight_map)
    text = str(caught.value)
    for part in (
        "unknown: unknown to this model",
        "embed: got bfloat16 [11, 9], expected bfloat16 [11, 8]",
        "head: holds embed, which embed holds as well",
        "0.weight: got float32 [4, 8], expected bfloat16 [4, 8]",
        "qkv.weight: holds 0.weight, which 0.weight holds as well",
    ):
        assert part in text


def test_a_plan_of_nothing_does_nothing() -> None:
    weight_map, _ = fused_model(8, (4, 2, 2))
    plan = compile_plan(Manifest(tensors=(), bucket_bytes=1), weight_map)
    stage = torch.zeros(0, dtype=torch.uint8)
    plan.replay(stage)
    assert plan.staged_fingerprints(stage).tolist() == plan.resident_fingerprints().tolist() == []


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12))
def test_joined_ranges_cover_the_same_bytes_and_no_two_of_them_follow_each_other(
    places: list[tuple[int, int]],
) -> None:
    ranges = sorted((first, first + size) for first, size in places)
    found = joined(ranges, lambda end, start: start <= end)
    covered = {byte for first, last in ranges for byte in range(first, last)}
    assert {byte for first, last in found for byte in range(first, last)} == covered
    assert sum(last - first for first, last in found) == len(covered)
    assert all(end < start for (_, end), (start, _) in pairwise(found))
