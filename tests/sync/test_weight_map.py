"""The weight map: what a model's parameters hold, checked when it is built."""

from __future__ import annotations

import pytest
import torch

from weight_sync.errors import ManifestMismatch
from weight_sync.layout.fused import Fused
from weight_sync.layout.holdings import Holdings, joint_problems
from weight_sync.layout.region import runs
from weight_sync.layout.weight_map import Placement, WeightMap


def place(name: str, shape: tuple[int, ...], region: object, destination: object) -> Placement:
    return Placement(name=name, shape=shape, region=region, destination=destination)


def fused_model() -> tuple[WeightMap, dict[str, torch.Tensor]]:
    """An embedding, q, k, v fused without padding, and a norm; the head is tied."""
    parameters = {
        "embed": torch.randn(5, 3),
        "qkv": torch.randn(7, 3),
        "norm": torch.randn(3),
    }
    qkv = parameters["qkv"]
    weight_map = WeightMap(
        [
            Placement.whole("embed_tokens", parameters["embed"]),
            Placement.whole("q", qkv[:3]),
            Placement.whole("k", qkv[3:5]),
            Placement.whole("v", qkv[5:]),
            Placement.whole("norm", parameters["norm"]),
        ],
        parameters,
        aliases={"lm_head": "embed_tokens"},
        fused={"qkv": ("q", "k", "v")},
        ignored={"inv_freq"},
    )
    return weight_map, parameters


def test_a_model_reads_back_by_every_name() -> None:
    weight_map, parameters = fused_model()
    qkv = parameters["qkv"]
    assert torch.equal(weight_map.read("k"), qkv[3:5])
    assert torch.equal(weight_map.read("qkv"), qkv)
    assert torch.equal(weight_map.read("lm_head"), parameters["embed"])
    assert weight_map.locate("qkv").canonical == ("q", "k", "v")
    assert weight_map.locate("lm_head").canonical == ("embed_tokens",)
    assert weight_map.is_ignored("inv_freq")
    assert not weight_map.is_ignored("q")


def test_what_is_read_is_a_copy() -> None:
    weight_map, parameters = fused_model()
    before = parameters["qkv"].clone()
    for name in ("q", "qkv"):
        weight_map.read(name).zero_()
    assert torch.equal(parameters["qkv"], before)


def test_canonical_tensors_come_in_resident_order() -> None:
    buffer = torch.zeros(30)
    parameters = {"b": buffer[20:], "a": buffer[:20]}
    weight_map = WeightMap(
        [
            Placement.whole("last", parameters["b"]),
            Placement.whole("second", parameters["a"][10:]),
            Placement.whole("first", parameters["a"][:10]),
        ],
        parameters,
    )
    assert [meta.name for meta in weight_map.metas()] == ["first", "second", "last"]


def test_a_shard_reads_as_its_part_of_a_whole_that_is_zero_elsewhere() -> None:
    shard = torch.randn(4, 2)
    weight_map = WeightMap([place("w", (4, 6), ((0, 4), (2, 4)), shard)], {"w": shard})
    whole = weight_map.read("w")
    assert torch.equal(whole[:, 2:4], shard)
    assert whole[:, :2].abs().sum() + whole[:, 4:].abs().sum() == 0


def test_an_unknown_name_is_refused_with_what_to_do() -> None:
    weight_map, _ = fused_model()
    with pytest.raises(ManifestMismatch, match=r"got 'q_proj', expected .* send Hugging Face"):
        weight_map.read("q_proj")


def problems(placements: list[Placement], parameters: dict[str, torch.Tensor], **names: object):
    with pytest.raises(ManifestMismatch) as caught:
        WeightMap(placements, parameters, **names)
    return str(caught.value)


def test_an_element_that_nothing_fills_is_an_error() -> None:
    parameter = torch.zeros(6, 4)
    assert "p: got no tensor for 8 of its 24 elements (at the end)" in problems(
        [Placement.whole("w", parameter[:4])], {"p": parameter}
    )
    assert "p: got no tensor for 4 of its 24 elements (before b)" in problems(
        [Placement.whole("a", parameter[:2]), Placement.whole("b", parameter[3:])],
        {"p": parameter},
    )
    assert "p: got no tensor for 24 of its 24 elements" in problems([], {"p": parameter})


def test_an_element_that_two_tensors_fill_is_an_error() -> None:
    parameter = torch.zeros(6, 4)
    text = problems(
        [Placement.whole("a", parameter[:4]), Placement.whole("b", parameter[3:])],
        {"p": parameter},
    )
    assert "p: got 4 elements of a over another tensor's" in text or "4 elements of b" in text


def test_strided_parts_are_counted_element_by_element() -> None:
    parameter = torch.zeros(6, 4)
    left, right = parameter[:, :1], parameter[:, 1:]
    WeightMap([Placement.whole("left", left), Placement.whole("right", right)], {"p": parameter})
    transposed = torch.zeros(6, 4).t()
    WeightMap([Placement.whole("t", transposed)], {"t": transposed})
    assert "p: got no tensor for 6 of its 24 elements" in problems(
        [Placement.whole("left", left), Placement.whole("right", parameter[:, 2:])],
        {"p": parameter},
    )
    assert "p: got 30 elements placed in it, expected 24" in problems(
        [Placement.whole("left", parameter[:, :2]), Placement.whole("right", right)],
        {"p": parameter},
    )


def test_all_problems_are_one_error() -> None:
    a, b, c = torch.zeros(4, 2), torch.zeros(3), torch.zeros(2, 2)
    text = problems(
        [
            place("shape", (4, 2), ((0, 4), (0, 1)), a),
            place("outside", (2,), ((0, 3),), b),
            place("doubled", (2, 2), ((0, 1), (0, 2)), c[:1]),
            place("doubled", (2, 2), ((0, 1), (0, 2)), c[1:]),
            Placement.whole("stray", torch.zeros(2)),
        ],
        {"a": a, "b": b, "c": c, "tied": c},
        aliases={"alias": "nobody", "shape": "doubled"},
        fused={"joined": ("shape", "missing")},
    )
    for part in (
        "shape: got a destination of shape [4, 2], expected [4, 1]",
        "outside: got region ((0, 3),), expected a part of [2]",
        "doubled: got regions",
        "stray: got a destination outside of the parameters",
        "tied: got a parameter in the memory of c",
        "alias: got an alias of 'nobody'",
        "shape: got two meanings",
        "joined: got the components ['missing']",
    ):
        assert part in text


def test_a_destination_that_reaches_beyond_its_parameter_is_an_error() -> None:
    memory = torch.zeros(10)
    text = problems([Placement.whole("w", memory[:6])], {"p": memory[:4]})
    assert "w: got a destination outside of the parameters" in text


def test_parts_of_one_tensor_agree_on_its_shape_and_dtype() -> None:
    a, b = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert "w: got parts of torch.float32 [4] and of torch.float64 [4]" in problems(
        [place("w", (4,), ((0, 2),), a), place("w", (4,), ((2, 4),), b)], {"a": a, "b": b}
    )


def test_fused_components_have_equal_rows() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    assert "ab: got components ['a', 'b'], expected equal rows and dtypes" in problems(
        [Placement.whole("a", a), Placement.whole("b", b)],
        {"a": a, "b": b},
        fused={"ab": ("a", "b")},
    )


def test_empty_tensors_and_scalars_have_a_place() -> None:
    parameters = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)}
    weight_map = WeightMap(
        [Placement.whole(name, value) for name, value in parameters.items()], parameters
    )
    assert float(weight_map.read("scalar")) == 2
    assert weight_map.read("empty").shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "region", "expected"),
    [
        ((4, 6), ((0, 4), (0, 6)), ([0], 48)),
        ((4, 6), ((1, 3), (0, 6)), ([12], 24)),
        ((4, 6), ((1, 3), (2, 5)), ([16, 28], 6)),
        ((3, 4, 5), ((0, 3), (1, 2), (0, 5)), ([10, 50, 90], 10)),
        ((3, 4, 5), ((1, 2), (1, 2), (3, 4)), ([56], 2)),
        ((2, 2, 3), ((0, 2), (0, 2), (1, 2)), ([2, 8, 14, 20], 2)),
        ((), (), ([0], 2)),
        ((4, 6), ((2, 2), (0, 6)), ([0], 0)),
    ],
)
def test_a_region_is_runs_of_bytes(shape: object, region: object, expected: object) -> None:
    starts, run_bytes = runs(shape, region, 2)
    assert (starts.tolist(), run_bytes) == expected


def stacked_model() -> tuple[WeightMap, dict[str, torch.Tensor]]:
    """Three experts of (2, 4) gates and ups, and their (4, 2) downs side by side along the last dimension."""
    parameters = {"gate_up": torch.randn(3, 4, 4), "down": torch.randn(4, 6)}
    experts = [{f"{i}.gate": (2, 4), f"{i}.up": (2, 4)} for i in range(3)]
    weight_map = WeightMap(
        [
            *(
                Placement.whole(f"{i}.{kind}", parameters["gate_up"][i, first : first + 2])
                for i in range(3)
                for first, kind in ((0, "gate"), (2, "up"))
            ),
            *(
                Placement.whole(f"{i}.down", parameters["down"][:, 2 * i : 2 * i + 2])
                for i in range(3)
            ),
        ],
        parameters,
        fused={
            "gate_up": Fused.stacked([Fused.joined(expert) for expert in experts]),
            "down": Fused.joined({f"{i}.down": (4, 2) for i in range(3)}, dim=1),
        },
    )
    return weight_map, parameters


def test_parts_join_along_any_dimension_and_stack_along_a_new_one() -> None:
    weight_map, parameters = stacked_model()
    for name, parameter in parameters.items():
        located = weight_map.locate(name)
        assert located.meta.shape == tuple(parameter.shape)
        assert torch.equal(located.read(), parameter)
        fused = weight_map.fused[name]
        for i, part in enumerate(fused.parts):
            shape = weight_map.locate(part).meta.shape
            assert torch.equal(fused.view(parameter, i, shape), weight_map.read(part))


@pytest.mark.parametrize(
    ("shape", "starts", "word"),
    [
        ((4, 3), ((0, 0), (1, 0)), "parts over each other"),
        ((6, 3), ((0, 0), (4, 0)), "got parts of 12 elements, expected 18"),
        ((3, 3), ((0, 0), (2, 0)), "outside"),
        ((4, 3), ((0, 0),), "2 parts at 1 places"),
        ((4,), ((0,), (2,)), "at most 1 dimensions"),
    ],
)
def test_parts_that_do_not_tile_their_whole_are_refused(shape, starts, word) -> None:
    parameters = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    text = problems(
        [Placement.whole(name, tensor) for name, tensor in parameters.items()],
        parameters,
        fused={"ab": Fused(shape=shape, parts=("a", "b"), starts=starts)},
    )
    assert "ab: " in text and word in text


def rank_map(owned: list[int]) -> WeightMap:
    """Three tensors, of which a rank owns some, and nothing of the others."""
    parameters = {f"w{i}": torch.full((2, 2), float(i)) for i in owned}
    empty = torch.empty(0, 2)
    return WeightMap(
        [
            Placement.whole(f"w{i}", parameters[f"w{i}"])
            if i in owned
            else place(f"w{i}", (2, 2), ((0, 0), (0, 2)), empty)
            for i in range(3)
        ],
        parameters,
    )


def test_a_rank_that_owns_nothing_of_a_name_has_it_in_its_manifest_all_the_same() -> None:
    ranks = [rank_map([0, 1]), rank_map([2])]
    assert ranks[0].metas() == ranks[1].metas()
    assert ranks[1].read("w0").sum() == 0 and not ranks[1].locate("w0").mask().any()
    assert joint_problems(ranks[0].metas(), [Holdings.of(rank) for rank in ranks]) == []


def test_ranks_that_leave_an_element_to_nobody_or_overlap_are_found_out() -> None:
    def found(*ranks: WeightMap) -> list[str]:
        return joint_problems(ranks[0].metas(), [Holdings.of(rank) for rank in ranks])

    assert found(rank_map([0]), rank_map([2])) == ["w1: got no rank for 4 of its 4 elements"]
    assert found(rank_map([0, 1, 2]), rank_map([1])) == []
    rows = [torch.zeros(2, 2), torch.zeros(2, 2)]
    overlapping = [
        WeightMap([place("w", (3, 2), ((first, first + 2), (0, 2)), part)], {"w": part})
        for first, part in enumerate(rows)
    ]
    assert "on two ranks" in found(*overlapping)[0]
    assert "another list" in found(overlapping[0], rank_map([0, 1, 2]))[0]
