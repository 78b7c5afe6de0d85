"""How many tokens a text has at least: never more than it has, nothing where a tokenizer may drop text."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

import made_tokenizers
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from rollout.cli.tiny import tiny_tokenizer
from rollout.errors import InvalidRequestError
from rollout.token_bounds import TokenBound
from rollout.tokenizer import Tokenizer, encode_prompts

SPECIAL = "<|end|>"
COMBINED = (
    "e\u0301",
    "a\u0323\u0302",
    "\u03b1\u0313\u0300\u0345",
    "\u03b9\u0308\u0301",
    "\u1100\u1161\u11a8",
    "\u212b",
)
PIECES = (
    *(
        "the ",
        "rollout",
        "aaaaaaaaaaaaaaaa",
        "=" * 40,
        " " * 64,
        "\n\n\t",
        "\u3000\u00a0",
        "\u2581",
    ),
    *("\u00e9", "\u4e2d\u6587", "\U0001f600", "\u1f82", "\uac01", "\ufb01", "\u037e", "\u1fef"),
    *COMBINED,
    *(SPECIAL, f" {SPECIAL} ", "<s>", "<0xE2>"),
)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.tuples(st.sampled_from(PIECES), st.integers(1, 12)).map(lambda p: p[0] * p[1]),
    ),
    max_size=8,
).map("".join)
WORDS = "(?i:'s|'t|'re)| ?\\w+| ?[^\\s\\w]+|\\s+"


def trained(
    *,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    alphabet: Any = None,
    model: Callable[[], Any] = models.BPE,
    tokens: Any = (),
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Merges of what the texts are made of, so that there are long tokens."""
    inner = Inner(model())
    if normalizer is not None:
        inner.normalizer = normalizer
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=alphabet or [],
        special_tokens=[name for name in tokens if isinstance(name, str)],
        **options,
    )
    inner.train_from_iterator([piece * 3 for piece in PIECES] * 5, trainer)
    inner.add_tokens([token for token in tokens if not isinstance(token, str)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def byte_level(normalizer: Any = None, *, first: Any = (), tokens: Any = (SPECIAL,)) -> Any:
    splits = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not first)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        normalizer=normalizer, pre_tokenizer=splits, alphabet=alphabet, tokens=("<s>", *tokens)
    )


def byte_fallback(normalizer: Any = None, pre_tokenizer: Any = None) -> Any:
    """As Llama's: U+2581 for a space, and bytes for what the vocabulary lacks."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    made = trained(normalizer=normalizer, pre_tokenizer=pre_tokenizer, tokens=["<s>", *names])
    spec = json.loads(made.backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = True
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in names]
    lacking = {"\u4e2d", "\U0001f600"}
    spec["model"]["vocab"] = {
        n: i for n, i in spec["model"]["vocab"].items() if not lacking & set(n)
    }
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if not lacking & set("".join(m))]
    return PreTrainedTokenizerFast(
        tokenizer_object=Inner.from_str(json.dumps(spec)), bos_token="<s>"
    )


def composed(normalizer: Any) -> Any:
    """Its longest tokens are two letters that other letters are composed to."""
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {letter: i for i, letter in enumerate(sorted(byte.alphabet()))}
    merges = []
    for letter in ("\u00e9", "\u0390"):
        first, *rest = byte.pre_tokenize_str(letter)[0][0]
        for following in rest:
            merges.append((first, following))
            first += following
            vocabulary[first] = len(vocabulary)
    inner = Inner(models.BPE(vocabulary, merges))
    inner.normalizer, inner.pre_tokenizer = normalizer, byte
    return PreTrainedTokenizerFast(tokenizer_object=inner)


LLAMA = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
KINDS: dict[str, Callable[[], Any]] = {
    "tiny": tiny_tokenizer,
    "byte-level": byte_level,
    "byte-level, NFC": lambda: byte_level(normalizers.NFC()),
    "byte-level, NFKC": lambda: byte_level(normalizers.NFKC()),
    "byte-level, NFD": lambda: byte_level(normalizers.NFD()),
    "byte-level, words and digits": lambda: byte_level(
        first=[
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    ),
    "byte-level, one piece": lambda: byte_level(
        normalizers.NFC(), first=[pre_tokenizers.Split("\x00", "merged_with_next")]
    ),
    "byte-level, tokens that take white space": lambda: byte_level(
        normalizers.NFC(), tokens=[AddedToken(SPECIAL, lstrip=True, rstrip=True)]
    ),
    "byte-level, normalized tokens": lambda: byte_level(
        normalizers.NFC(),
        tokens=[AddedToken(SPECIAL), AddedToken("e\u0301" * 9), AddedToken(" " * 30)],
    ),
    "composed letters": lambda: composed(normalizers.NFC()),
    "composed letters, NFKC": lambda: composed(normalizers.NFKC()),
    "byte fallback": lambda: byte_fallback(LLAMA),
    "byte fallback, metaspace": lambda: byte_fallback(None, pre_tokenizers.Metaspace()),
    "byte fallback, NFC": lambda: byte_fallback(
        normalizers.Sequence([normalizers.NFC(), LLAMA]),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    ),
}


@cache
def made(kind: str) -> tuple[Tokenizer, TokenBound]:
    tokenizer = Tokenizer.around(KINDS[kind]())
    bound = tokenizer._bound
    assert bound is not None
    return tokenizer, bound


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
@example(text=" " * 5000)
@example(text="e\u0301" * 900)
@example(text="\u03b9\u0308\u0301" * 900)
@example(text="\u03b1\u0313\u0300\u0345" * 900)
@example(text=f"{SPECIAL}{' ' * 9000}{SPECIAL}")
@example(text="=" * 4000)
@example(text="\u2581" * 900)
def test_no_text_has_fewer_tokens_than_it_is_said_to_have(kind: str, text: str) -> None:
    tokenizer, _ = made(kind)
    if not (least := tokenizer.least_tokens(text)):
        return
    for add_special_tokens in (None, False, True):
        assert least <= len(tokenizer.encode(text, add_special_tokens))
    limit = len(tokenizer.encode(text))
    assert encode_prompts(tokenizer, [text], context_length=limit)  # what fits is never refused


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_grows_with_the_text(kind: str) -> None:
    tokenizer, bound = made(kind)
    word = "rollout\u4e2d\U0001f600e\u0301"
    num = len(tokenizer.encode(word * 2000, False))
    assert num / 400 < bound.least(word * 2000) <= num


def test_letters_that_no_long_token_has_count_for_more_than_those_of_the_longest() -> None:
    _, bound = made("byte-level")
    assert bound.least("=" * 6400) < bound.least("rollout" * 900) / 2


def test_of_normal_forms_only_what_the_bound_says_is_true() -> None:
    for number in range(0x110000):
        if 0xD800 <= number < 0xE000:
            continue
        character = chr(number)
        parts_per_byte = len(unicodedata.normalize("NFD", character)) / len(character.encode())
        assert 0 < parts_per_byte <= 1.5
        assert unicodedata.normalize("NFKD", character)
        parts = unicodedata.decomposition(character).split()
        if parts and not parts[0].startswith("<"):  # nothing is composed with ASCII behind it
            assert all(int(part, 16) >= 0x80 for part in parts[1:])
    white = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    white += "".join(map(chr, range(0x2000, 0x200B)))
    assert all(character.isspace() for character in white)  # as Unicode has it, and tokenizers


def unigram() -> Any:
    inner = Inner(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def endings() -> Any:
    return trained(
        alphabet=pre_tokenizers.ByteLevel.alphabet(),
        pre_tokenizer=pre_tokenizers.ByteLevel(),
        model=lambda: models.BPE(end_of_word_suffix="</w>"),
        end_of_word_suffix="</w>",
    )


def truncating() -> Any:
    inner = byte_level().backend_tokenizer
    inner.enable_truncation(5)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


class Shortening(PreTrainedTokenizerFast):
    """One with an `encode` of its own."""

    def encode(self, text: Any, *args: Any, **options: Any) -> list[int]:
        return list(super().encode(text[:3], *args, **options))


UNBOUNDED: dict[str, Callable[[], Any]] = {
    "word pieces": lambda: made_tokenizers.word_pieces(["a"]).inner,
    "words": lambda: made_tokenizers.byte_fallback([" a", " b"]).inner,
    "bytes that are no tokens": lambda: made_tokenizers.byte_level([b"a", b"b"]).inner,
    "unknown characters": lambda: trained(),
    "unigram": unigram,
    "stripped": lambda: byte_level(normalizers.Strip()),
    "accents": lambda: byte_level(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "collapsed": lambda: byte_level(normalizers.Replace(Regex(" +"), " ")),
    "removed words": lambda: byte_level(normalizers.Replace("the", "")),
    "lower case": lambda: byte_level(normalizers.Lowercase()),
    "BERT": lambda: byte_level(normalizers.BertNormalizer()),
    "dropped spaces": lambda: byte_level(first=[pre_tokenizers.WhitespaceSplit()]),
    "dropped splits": lambda: byte_level(first=[pre_tokenizers.Split(" ", "removed")]),
    "another letter for a space": lambda: byte_fallback(None, pre_tokenizers.Metaspace("_")),
    "spaces that grow before they are bytes": lambda: byte_level(
        first=[pre_tokenizers.Metaspace()]
    ),
    "endings": endings,
    "truncating": truncating,
    "an encode of its own": lambda: Shortening(tokenizer_object=byte_level().backend_tokenizer),
    "no tokenizer of transformers": object,
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_there_is_no_bound_where_text_may_be_dropped(kind: str) -> None:
    tokenizer = Tokenizer.around(UNBOUNDED[kind]())
    assert tokenizer._bound is None
    assert tokenizer.least_tokens("a" * 1_000_000) == 0


def test_a_text_that_is_far_too_long_is_refused_before_it_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Tokenizer.around(tiny_tokenizer())
    monkeypatch.setattr(tokenizer, "encode", lambda *_: pytest.fail("it was encoded"))
    start = time.process_time()
    with pytest.raises(
        InvalidRequestError, match=r"^prompt 0: got at least \d+ tokens, expected f"
    ):
        encode_prompts(tokenizer, ["a b " * 2_000_000], context_length=512)
    assert time.process_time() - start < 1.0


def test_without_a_limit_any_text_is_encoded() -> None:
    tokenizer = Tokenizer.around(tiny_tokenizer())
    assert len(encode_prompts(tokenizer, ["a" * 10_000])[0]) == 10_000
