"""Text as it is streamed: nothing is taken back, and the pieces make the final text, whatever the tokens and stops."""

from __future__ import annotations

import codecs
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import SPECIAL, byte_fallback, byte_level, word_pieces

from rollout import Engine
from rollout.detokenizer import IncrementalDetokenizer, whole_text
from rollout.engine.loop.sample_state import GenerateGroup, SampleState
from rollout.engine.results import Extras, ResultBuilder
from rollout.protocol.commands import PromptSpec
from rollout.sampling_params import SamplingParams
from rollout.scheduling import Request
from rollout.stop_strings import StopStringWatcher
from rollout.tokenizer import Tokenizer

LETTERS = ["a", "b", "\n", "}", " ", "\u00e9", "\u4e16", "\U0001f600"]
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


def texts_of(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    stop_id: int | None = None,
    undone: tuple[int, Sequence[int]] = (0, ()),
    **options: Any,
) -> tuple[list[str], str, int]:
    """What the chunks of a stream show, what a call that does not stream returns, and how many tokens there are.

    undone: after so many tokens these were drawn, and taken back before anybody heard of them.
    """
    params = SamplingParams(max_new_tokens=len(tokens), **options)
    spec = PromptSpec(rid="r", input_ids=[2], params=params)
    group = GenerateGroup(1, None, lambda _: None, True, math.inf, 1)  # type: ignore[arg-type]
    watcher = None
    if params.stop:
        watcher = StopStringWatcher(tokenizer, params.stop, min_new_tokens=params.min_new_tokens)
    stops = frozenset() if stop_id is None else frozenset((stop_id,))
    state = SampleState(group, spec, 0, stops, watcher, None)
    request = Request(rid="r", prompt_ids=[2], params=params, outputs=state)
    stream, whole = (ResultBuilder(spec, tokenizer, Extras()) for _ in range(2))
    shown = []
    for number, token in enumerate(tokens):
        if number == undone[0]:
            for other in undone[1]:
                request.token_ids.append(other)
                if state.finish_reason(request) is not None:
                    break
            del request.token_ids[1 + number :]
            state.cut(number, number)
        request.token_ids.append(token)
        state.note_token(number, "0", 0)
        reason = state.finish_reason(request)
        update = state.update(request, reason, "0", 0)
        stream.add(update)
        whole.add(update)
        shown.append(stream.result()["text"])
        if reason is not None:
            break
    assert stream.finished
    return shown, whole.result()["text"], len(shown)


def check_stream(shown: Sequence[str], final: str) -> None:
    """Each text begins with the one before, and the last one is the final text."""
    for before, after in itertools.pairwise(shown):
        assert after.startswith(before)
    assert shown[-1] == final


Byte = st.integers(0, 255)
Piece = st.one_of(
    st.sampled_from(LETTERS).map(str.encode),
    st.builds(
        lambda letters, first, last: "".join(letters).encode()[first:last],
        st.lists(st.sampled_from(LETTERS), min_size=1, max_size=3),
        st.integers(0, 3),
        st.integers(1, 8),
    ),
    st.binary(min_size=1, max_size=2),
).filter(bool)
Vocabulary = st.lists(Piece, min_size=1, max_size=12, unique=True)
Stops = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL, "a<eos>", "<", "b\n"]),
        st.text(st.sampled_from(LETTERS), min_size=1, max_size=3),
    ),
    max_size=3,
)


class Oracle:
    """The right text of a byte-level output, from its bytes alone."""

    def __init__(self, pieces: Sequence[bytes], hidden: Sequence[bool]) -> None:
        self.pieces = pieces
        self.hidden = hidden

    def raw(self, num: int) -> str:
        return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(self.pieces[:num]))

    def visible(self, num: int, final: bool) -> str:
        shown = [p for p, hidden in zip(self.pieces[:num], self.hidden, strict=False) if not hidden]
        return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(shown), final)

    def stopped(self, stops: Sequence[str], minimum: int) -> tuple[int, str] | None:
        """After how many tokens a stop string ends the output, and its text before that string."""
        for num in range(minimum + 1, len(self.pieces) + 1):
            before, text = self.raw(num - 1), self.raw(num)
            starts = [text.find(stop, max(0, len(before) + 1 - len(stop))) for stop in stops]
            found = [at for at in starts if at >= 0]
            if found:
                return num, self._text_before(min(found))
        return None

    def _text_before(self, at: int) -> str:
        num = next(n for n in range(len(self.pieces) + 1) if len(self.raw(n)) > at)
        if self.hidden[num - 1]:
            return self.visible(num - 1, True)
        text = self.visible(num, False)
        return text[: len(text) - (len(self.raw(num)) - at)]


@PROPERTY
@given(
    vocabulary=Vocabulary,
    picks=st.lists(st.integers(0, 1000), min_size=1, max_size=25),
    stops=Stops,
    slices=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=3),
    minimum=st.integers(0, 6),
    skip=st.booleans(),
)
def test_byte_level_text_is_that_of_its_bytes_and_never_taken_back(
    vocabulary: list[bytes],
    picks: list[int],
    stops: list[str],
    slices: list[tuple[int, int]],
    minimum: int,
    skip: bool,
) -> None:
    tokenizer = byte_level(vocabulary)
    tokens = [pick % (2 + len(vocabulary)) for pick in picks]
    names = [*(name.encode() for name in SPECIAL), *vocabulary]
    oracle = Oracle([names[t] for t in tokens], [skip and t < 2 for t in tokens])
    minimum = min(minimum, len(tokens))
    text = oracle.raw(len(tokens))
    found = [text[first : first + size] for first, size in slices]
    stops = [*stops, *(stop for stop in found if stop and "\ufffd" not in stop)]
    options = {"stop": stops, "min_new_tokens": minimum, "skip_special_tokens": skip}
    shown, final, num = texts_of(tokenizer, tokens, **options)
    check_stream(shown, final)
    stopped = oracle.stopped(stops, minimum) if stops else None
    assert (num, final) == (stopped or (len(tokens), oracle.visible(len(tokens), True)))
    shown, whole, _ = texts_of(tokenizer, tokens, **options, no_stop_trim=True)
    check_stream(shown, whole)
    assert whole == oracle.visible(num, True)


@PROPERTY
@given(
    tokens=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    at=st.integers(0, 11),
    others=st.lists(st.integers(0, 6), max_size=6),
    stops=st.lists(st.sampled_from(["ab", "b<eos>", "\u4e16a", "aaa"]), max_size=2),
)
def test_tokens_that_are_taken_back_leave_no_trace_in_the_text(
    tokens: list[int], at: int, others: list[int], stops: list[str]
) -> None:
    tokenizer = byte_level([b"a", b"b", b"\xe4", b"\xb8", b"\x96"])
    undone = (at, others)
    assert texts_of(tokenizer, tokens, stop=stops, undone=undone) == texts_of(
        tokenizer, tokens, stop=stops
    )


@functools.cache
def made(kind: str) -> Tokenizer:
    if kind == "bytes":
        return byte_fallback([" a", " b", "b", " \u4e16", "\u4e16\u754c", " ", "\n", " b}"])
    return word_pieces(["a", "b", "##b", "world", "##s", ".", "\u4e16", "##\u754c"])


@PROPERTY
@given(
    kind=st.sampled_from(["bytes", "pieces"]),
    text=st.lists(
        st.one_of(
            st.integers(0, 1000).map(lambda n: [n]),
            st.sampled_from(LETTERS).map(lambda c: [-1 - b for b in c.encode()]),
            st.lists(Byte.map(lambda b: -1 - b), max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    stops=Stops,
    minimum=st.integers(0, 3),
    skip=st.booleans(),
    end=st.sampled_from([None, 0, 5]),
)
def test_other_tokenizers_take_nothing_back_either(
    kind: str, text: list[list[int]], stops: list[str], minimum: int, skip: bool, end: int | None
) -> None:
    tokenizer = made(kind)
    words = [t for t in tokenizer.inner.get_vocab().values() if kind != "bytes" or not 2 <= t < 258]
    tokens = [words[t % len(words)] if t >= 0 else 2 + (-1 - t) for part in text for t in part]
    tokens = [t if t in tokenizer.inner.get_vocab().values() else 3 for t in tokens] or [3]
    options = {
        "stop": stops,
        "min_new_tokens": min(minimum, len(tokens)),
        "skip_special_tokens": skip,
    }
    shown, final, num = texts_of(tokenizer, tokens, stop_id=end, **options)
    check_stream(shown, final)
    whole = tokenizer.decode(tokens, skip_special_tokens=skip)
    if num == len(tokens) and not stops and end is None and "\ufffd" not in whole:
        assert final == whole


def test_complete_characters_of_a_run_of_bytes_survive_an_incomplete_one() -> None:
    tokenizer = made("bytes")
    run = [2 + byte for byte in "\u4e16\u754c".encode()]
    assert tokenizer.decode(run[:5], skip_special_tokens=True) == "\ufffd" * 5
    assert whole_text(tokenizer, run[:5], skip_special_tokens=True) == "\u4e16\ufffd\ufffd"
    assert whole_text(tokenizer, run, skip_special_tokens=True) == "\u4e16\u754c"
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    assert [detokenizer.add(token) for token in run] == ["", "", "\u4e16", "", "", "\u754c"]


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_a_stream_through_an_engine_takes_nothing_back(
    tiny_checkpoint: Callable[..., Path], executor: Any
) -> None:
    params = {"temperature": 1.5, "max_new_tokens": 60, "n": 4, "stop": ["a", "<bos>", "\ufffdx"]}
    folder = tiny_checkpoint("qwen3", head_dim=32)
    with Engine(folder, kv_cache_bytes=1 << 20, executor=executor) as engine:
        texts = [""] * 4
        for chunk in engine.generate("the", {**params, "sampling_seed": 3}, stream=True):
            assert chunk["text"].startswith(texts[chunk["index"]])
            texts[chunk["index"]] = chunk["text"]
        whole = engine.generate("the", {**params, "sampling_seed": 3})
    assert texts == [result["text"] for result in whole]
    assert any("\ufffd" in text for text in texts)
