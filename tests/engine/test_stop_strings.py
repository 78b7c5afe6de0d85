"""Which stop string ends an output, and where its text ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import byte_fallback, byte_level

from rollout import Engine
from rollout.stop_strings import StopStringWatcher
from rollout.tokenizer import Tokenizer

EOS, IM_END = 0, 1
TOKENS = [b"a", b"b", b"c", b"\n", b"};\n", b"ab", b"\xe4", b"\xb8\x96", b"\xb8\x96c", b"x\xe4"]
A, B, C, NEWLINE, CLOSE, AB, HEAD, REST, REST_C, X_HEAD = range(2, 12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level(TOKENS)


def first_match(
    tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str], min_new_tokens: int = 0
) -> tuple[int, str, tuple[int, int]] | None:
    """After how many tokens which string stops, and where the text ends."""
    watcher = StopStringWatcher(tokenizer, stops, min_new_tokens=min_new_tokens)
    for number, token in enumerate(tokens, 1):
        match = watcher.add(token)
        if match is not None:
            return number, match.stop, match.text_end
    return None


@pytest.mark.parametrize(
    ("tokens", "stops", "expected"),
    [
        ([A, B, IM_END, C], ["<|im_end|>"], (3, "<|im_end|>", (3, 10))),
        ([A, B, EOS, C], ["b<eos>c"], (4, "b<eos>c", (2, 1))),
        ([C, EOS, NEWLINE], ["c\n"], None),
        ([C, NEWLINE], ["c\n"], (2, "c\n", (1, 1))),
        ([B, CLOSE], ["\n", "}"], (2, "}", (2, 3))),
        ([A, A, B], ["b", "ab"], (3, "ab", (2, 1))),
        ([A, AB], ["b", "ab", "a"], (1, "a", (1, 1))),
        ([C, AB], ["b", "ab", "abc", "a"], (2, "ab", (2, 2))),
        ([HEAD, REST], ["\u4e16"], (2, "\u4e16", (2, 1))),
        ([X_HEAD, REST_C], ["x\u4e16c"], (2, "x\u4e16c", (1, 1))),
        ([X_HEAD, REST_C], ["x"], (1, "x", (1, 1))),
        ([HEAD, A], ["\ufffd"], (2, "\ufffd", (2, 2))),
    ],
)
def test_the_stop_string_that_begins_first_wins_in_the_text_with_special_tokens(
    tokenizer: Tokenizer, tokens: list[int], stops: list[str], expected: Any
) -> None:
    assert first_match(tokenizer, tokens, stops) == expected


@pytest.mark.parametrize(
    ("minimum", "expected"),
    [(0, (2, "b", (2, 1))), (1, (2, "b", (2, 1))), (2, (5, "b", (5, 1))), (5, None)],
)
def test_a_stop_string_inside_the_minimum_is_ignored(
    tokenizer: Tokenizer, minimum: int, expected: Any
) -> None:
    assert first_match(tokenizer, [A, B, C, C, B, C, C], ["b"], minimum) == expected


def test_a_stop_string_that_ends_behind_the_minimum_counts(tokenizer: Tokenizer) -> None:
    assert first_match(tokenizer, [A, B, C, C, C], ["abc"], 2) == (3, "abc", (1, 1))
    assert first_match(tokenizer, [A, B, C, A, B, C], ["abc"], 3) == (6, "abc", (4, 1))


def test_a_stop_string_matches_in_a_run_of_byte_tokens() -> None:
    tokenizer = byte_fallback([" a", " b", " hello", "x"])
    run = [2 + byte for byte in "\u4e16\u754c".encode()]
    assert first_match(tokenizer, [260, *run, 261], ["\u754c"]) == (7, "\u754c", (7, 1))
    assert first_match(tokenizer, [260, *run[:4], 261], ["\u4e16"]) == (4, "\u4e16", (4, 1))


def test_what_may_become_a_stop_string_is_held(tokenizer: Tokenizer) -> None:
    watcher = StopStringWatcher(tokenizer, ["abc", "bb"])
    held = []
    for token in (C, A, B, A, AB, HEAD, REST):
        assert watcher.add(token) is None
        held.append(watcher.held)
    assert held == [None, (2, 1), (2, 1), (4, 1), (5, 2), (5, 2), None]


def test_a_watcher_of_a_long_output_keeps_little(tokenizer: Tokenizer) -> None:
    watcher = StopStringWatcher(tokenizer, ["abcabcabd"])
    for _ in range(1000):
        for token in (A, B, C):
            assert watcher.add(token) is None
    assert len(watcher._tail) == 8 and len(watcher._ends) <= 8


# Through the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["inline", "local"])
def engine(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]
) -> Iterator[Engine]:
    folder = tiny_checkpoint("qwen3", head_dim=32)
    with Engine(folder, kv_cache_bytes=1 << 20, executor=request.param) as engine:
        yield engine


def few_letters(engine: Engine, seed: int, **params: Any) -> dict[str, Any]:
    """Parameters of an output that is made of "c", a line's end and the end token, in an order that the seed draws."""
    encode = engine.tokenizer.encode
    ids = [*encode("c", add_special_tokens=False), *encode("\n", add_special_tokens=False), 258]
    return {
        "logit_bias": dict.fromkeys(ids, 2000.0),
        "temperature": 20.0,
        "ignore_eos": True,
        "max_new_tokens": 40,
        "sampling_seed": seed,
        **params,
    }


def generate(engine: Engine, params: dict[str, Any]) -> dict[str, Any]:
    """The result, which is that of the stream as well, whose texts only grow."""
    result: dict[str, Any] = engine.generate("the", params)
    text = ""
    for chunk in engine.generate("the", params, stream=True):
        assert chunk["text"].startswith(text)
        text = chunk["text"]
    assert text == result["text"] and chunk["output_ids"] == result["output_ids"]
    return result


@pytest.mark.parametrize("seed", range(3))
def test_a_special_token_stops_as_a_string_and_hides_nothing_around_it(
    engine: Engine, seed: int
) -> None:
    tokens = engine.generate("the", few_letters(engine, seed))["output_ids"]
    raw = [engine.tokenizer.decode([token]) for token in tokens]
    assert {"c", "\n", "<eos>"} == set(raw)
    for stop in ("<eos>", "c\n"):
        result = generate(engine, few_letters(engine, seed, stop=[stop]))
        number = next(n for n in range(1, len(raw)) if "".join(raw[:n]).endswith(stop))
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert result["output_ids"] == tokens[:number]
        shown = "".join(raw[:number]).removesuffix(stop).replace("<eos>", "")
        assert result["text"] == shown


@pytest.mark.parametrize("seed", range(2))
def test_a_minimum_is_kept_and_the_text_ends_where_the_request_stopped(
    engine: Engine, seed: int
) -> None:
    tokens = engine.generate("the", few_letters(engine, seed))["output_ids"]
    raw = [engine.tokenizer.decode([token]) for token in tokens]
    minimum = raw.index("\n") + 3
    result = generate(engine, few_letters(engine, seed, stop="\n", min_new_tokens=minimum))
    number = next(n for n in range(minimum + 1, 40) if raw[n - 1] == "\n")
    assert result["output_ids"] == tokens[:number]
    assert result["text"] == "".join(raw[: number - 1]).replace("<eos>", "")
    whole = few_letters(engine, seed, stop="\n", min_new_tokens=minimum, no_stop_trim=True)
    assert generate(engine, whole)["text"] == "".join(raw[:number]).replace("<eos>", "")


def test_an_end_token_whose_text_a_stop_string_reaches_into_leaves_out_that_string(
    engine: Engine,
) -> None:
    params = few_letters(engine, 0, stop=["c<eos>"], ignore_eos=False)
    end_alone, with_stop = [], []
    for seed in range(8):
        result = generate(engine, {**params, "sampling_seed": seed})
        before = [engine.tokenizer.decode([token]) for token in result["output_ids"]][:-1]
        matched = result["meta_info"]["finish_reason"]["matched"]
        (end_alone if matched == 258 else with_stop).append(seed)
        assert matched == ("c<eos>" if before[-1:] == ["c"] else 258)
        assert result["text"] == "".join(before[:-1] if matched != 258 else before)
    assert end_alone and with_stop
