"""Sampling parameters: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from rollout.errors import InvalidRequestError
from rollout.sampling_params import SamplingParams, asked_new_tokens, mix64


def message(value: object, vocab_size: int | None = None) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams.from_dict(value, vocab_size)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_those_of_the_field() -> None:
    params = SamplingParams.from_dict(None)
    assert (params.max_new_tokens, params.temperature, params.n) == (128, 1.0, 1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, -1, 0.0)
    assert not params.has_penalties and not params.is_greedy
    assert SamplingParams.from_dict({}) == SamplingParams() == params


@pytest.mark.parametrize(
    ("given", "field", "normal"),
    [
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": ["x", "yy"]}, "stop", ("x", "yy")),
        ({"stop": None}, "stop", ()),
        ({"stop_token_ids": [1, 2]}, "stop_token_ids", (1, 2)),
        ({"stop_token_ids": np.array([3])}, "stop_token_ids", (3,)),
        ({"logit_bias": {"7": 1}}, "logit_bias", {7: 1.0}),
        ({"logit_bias": {}}, "logit_bias", None),
        ({"top_k": 0}, "top_k", -1),
        ({"temperature": 1}, "temperature", 1.0),
        ({"temperature": np.float32(0.5)}, "temperature", 0.5),
        ({"max_new_tokens": np.int64(4)}, "max_new_tokens", 4),
        ({"max_new_tokens": 0}, "max_new_tokens", 0),
        ({"max_new_tokens": None}, "max_new_tokens", 128),
        ({"min_p": None}, "min_p", 0.0),
        ({"sampling_seed": 0}, "sampling_seed", 0),
    ],
)
def test_values_are_normalised(given: dict, field: str, normal: object) -> None:
    params = SamplingParams.from_dict(given)
    assert getattr(params, field) == normal
    assert type(getattr(params, field)) is type(normal)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"frequency_penalty": 2.5},
        {"presence_penalty": -2.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": 2.5},
        {"n": 0},
        {"n": 2**40},
        {"n": True},
        {"max_new_tokens": -1},
        {"max_new_tokens": 3.0},
        {"min_new_tokens": 5, "max_new_tokens": 4},
        {"stop": ""},
        {"stop": ["a", 3]},
        {"stop": 3},
        {"stop": ["x"] * 1025},
        {"stop": ["x" * 8000, "y" * 8385]},
        {"stop_token_ids": 3},
        {"stop_token_ids": "3"},
        {"stop_token_ids": [-1]},
        {"logit_bias": [1]},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1: float("inf")}},
        {"ignore_eos": 1},
        {"no_stop_trim": "yes"},
        {"sampling_seed": -1},
        {"sampling_seed": 2**63},
        {"sampling_seed": 1.0},
        {"regex": "a+"},
        {"json_schema": "{}"},
        {"custom_params": {"a": 1}},
    ],
)
def test_what_cannot_be_meant_is_refused_in_four_parts(given: dict) -> None:
    name = next(iter(given))
    text = message(given)
    assert name in text and ": got " in text and ", expected " in text and "; " in text


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("temprature", "temperature"),
        ("max_gen_len", "max_new_tokens"),
        ("topk", "top_k"),
        ("random_seed", "sampling_seed"),
        ("stop_tokens", "stop_token_ids"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(unknown: str, nearest: str) -> None:
    text = message({unknown: 1})
    assert repr(unknown) in text and text.endswith(f"did you mean {nearest!r}?")


def test_what_others_call_a_parameter_is_understood() -> None:
    given = {"max_tokens": 9, "min_tokens": 2, "seed": 5}
    expected = {"max_new_tokens": 9, "min_new_tokens": 2, "sampling_seed": 5}
    assert SamplingParams.from_dict(given) == SamplingParams(**expected)
    assert SamplingParams.from_dict({"seed": 5, "sampling_seed": 5}).sampling_seed == 5
    assert "under one name" in message({"max_tokens": 9, "max_new_tokens": 8})


def test_unsupported_names_are_accepted_when_they_ask_for_nothing() -> None:
    given = {"regex": None, "json_schema": None, "ebnf": None, "custom_params": {}}
    assert SamplingParams.from_dict(given) == SamplingParams()


def test_token_ids_must_be_inside_the_vocabulary() -> None:
    inside = {"stop_token_ids": [99], "logit_bias": {"99": 1}}
    SamplingParams.from_dict(inside, vocab_size=100)
    assert "99" in message({"stop_token_ids": [99]}, 99)
    assert "99" in message(SamplingParams(logit_bias={99: 1.0}), 99)


def test_stop_strings_up_to_the_limit_are_taken() -> None:
    many = [f"{i:016}" for i in range(1024)]
    assert SamplingParams(stop=many).stop == tuple(many)
    assert len(message({"stop": [*many, "x"]})) < 300


@pytest.mark.parametrize("penalty", [5e-324, 1e-50, 1e-45, 1e-38])
def test_a_penalty_that_float32_does_not_hold_makes_no_infinite_logit(penalty: float) -> None:
    factor = np.float32(SamplingParams(repetition_penalty=penalty).repetition_penalty)
    assert 0 < factor and np.isfinite(np.float32(1e4) / factor / np.float32(1e-6))
    assert SamplingParams(repetition_penalty=0.01).repetition_penalty == 0.01


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(message({"stop": {"x" * 1000: 1}})) < 300


@pytest.mark.parametrize("value", [3, "greedy", [{}]])
def test_only_a_dict_is_taken(value: object) -> None:
    assert "expected a dict" in message(value)


def test_the_constructor_and_the_wire_check_like_from_dict() -> None:
    with pytest.raises(InvalidRequestError, match="top_p"):
        SamplingParams(top_p=0.0)
    with pytest.raises(msgspec.ValidationError, match="top_p"):
        msgspec.json.decode(b'{"top_p": 0.0}', type=SamplingParams)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"topp": 0.5}', type=SamplingParams)


@pytest.mark.parametrize(
    ("given", "greedy", "logprob_temperature"),
    [
        ({"temperature": 0.0}, True, 1.0),
        ({"temperature": 9e-7}, True, 1.0),
        ({"temperature": 1e-6}, False, 1e-6),
        ({"temperature": 0.5, "top_k": 1}, True, 0.5),
        ({"temperature": 0.5}, False, 0.5),
    ],
)
def test_greedy_follows_from_temperature_or_top_k(
    given: dict, greedy: bool, logprob_temperature: float
) -> None:
    params = SamplingParams(**given)
    assert params.is_greedy == greedy
    assert params.logprob_temperature == logprob_temperature


def test_seeds_of_samples_differ_and_repeat() -> None:
    given = [SamplingParams(sampling_seed=seed) for seed in (10, 11, 2**63 - 1)]
    streams = {params.seed_for_sample(i, 7, 3) for params in given for i in range(64)}
    assert len(streams) == 3 * 64 and max(streams) < 2**64
    assert given[0].seed_for_sample(1, 7, 3) == given[0].seed_for_sample(1, 8, 4)
    free = SamplingParams()
    seeds = {
        free.seed_for_sample(i, engine, number)
        for i in range(8)
        for engine in range(8)
        for number in range(8)
    }
    assert len(seeds) == 512 and max(seeds) < 2**64
    assert free.seed_for_sample(1, 2, 3) == free.seed_for_sample(1, 2, 3)


def test_mix64_is_splitmix64() -> None:
    # First outputs of the published generator for state 0: the finaliser of multiples of its constant.
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix64(i * gamma % 2**64) for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_what_a_step_holds_in_arrays_fits_them_whatever_was_asked() -> None:
    """A number that does not would fail the step, and with it everybody's requests in it."""
    for asked in (2**31, 2**63, 2**64 - 1, 10**400):
        assert SamplingParams(top_k=asked).top_k == 2**31 - 1
    lowest = float(np.finfo(np.float32).min)
    bias = SamplingParams(logit_bias={1: lowest, 2: -1e308, 3: 1e308, 4: -7.5}).logit_bias
    assert bias == {1: -1e30, 2: -1e30, 3: 1e30, 4: -7.5}
    temperature = SamplingParams(temperature=1e-6).temperature
    assert all(np.isfinite(np.float32(value) / temperature) for value in bias.values())


def test_a_limit_is_found_under_each_of_its_names() -> None:
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert asked_new_tokens({"n": 2, name: 7}) == 7
        assert SamplingParams.from_dict({name: 7}).max_new_tokens == 7
    assert asked_new_tokens({"max_new_tokens": None, "max_tokens": 7}) == 7
    assert asked_new_tokens({"n": 2}) is None
