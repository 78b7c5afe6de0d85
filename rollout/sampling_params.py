"""Sampling parameters of one request: their names, defaults, ranges, and what follows from them.

Every way to build a `SamplingParams` checks and normalises: the constructor, `from_dict`, and decoding from a wire.
An error is one line: which parameter, what was got, what was expected, what to do.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from .errors import InvalidRequestError
from .hints import best_match

GREEDY_TEMPERATURE = 1e-6
"""Below this temperature a request is greedy and its log-probabilities are untempered."""
MAX_SAMPLES = 16384
"""Largest `n`; it bounds what one message can make the engine create."""
_MOST_KEPT = (1 << 31) - 1
"""More than any vocabulary has: what `top_k` is cut to, since steps hold it in arrays."""
_LARGEST_BIAS = 1e30
"""What a bias is cut to: no logit counts beside it, and in float32, at any temperature, it stays finite."""
_SMALLEST_FACTOR = 1e-20
"""What a repetition penalty is raised to: a logit divided by it beats all others, and in float32, at any temperature,
it stays finite."""
MAX_STOPS = 1024
"""Most stop strings of a request, which are looked for in the text of each of its tokens."""
MAX_STOP_CHARS = 16384
"""Most characters of them together."""
_MASK64 = (1 << 64) - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request's tokens are drawn, and when it ends. Immutable, checked when built."""

    max_new_tokens: int = 128
    """Tokens to draw at most; 0: the prompt is computed and nothing is drawn."""
    min_new_tokens: int = 0
    """Tokens to draw before an end-of-sequence or stop token may be drawn, and before a stop string counts."""
    temperature: float = 1.0
    """Divides the logits; below 1e-6 the request is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; applied after `top_k`."""
    top_k: int = -1
    """Keep the k most likely tokens; -1 (0 is accepted too): all; 1: always the most likely one."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one's probability."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit once if it occurs in the output."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occur in prompt or output."""
    n: int = 1
    """Samples of the prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end the output, looked for in its text with special tokens; of several the one that begins first. At
    most 1,024, of 16,384 characters together. A single string and None are accepted when building."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the end-of-sequence tokens; any sequence is accepted when building."""
    ignore_eos: bool = False
    """Go on after end-of-sequence tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of `text`."""
    spaces_between_special_tokens: bool = True
    """Put spaces between special tokens in `text`."""
    no_stop_trim: bool = False
    """Keep the matched stop string or stop token in `text`."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; keys may be strings when building; None: no bias."""
    sampling_seed: int | None = None
    """Makes the draws reproducible whatever the batch; every
    sample of a request has a stream of its own, of the seed and the sample's number; None: the engine's choice."""

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            normal = _NORMALISERS[name](name, value)
            if normal is not value:
                msgspec.structs.force_setattr(self, name, normal)
        if self.min_new_tokens > self.max_new_tokens:
            raise _error(
                "min_new_tokens",
                self.min_new_tokens,
                f"at most max_new_tokens ({self.max_new_tokens})",
                "lower it or raise max_new_tokens",
            )

    @classmethod
    def from_dict(
        cls, value: Mapping[str, Any] | SamplingParams | None, vocab_size: int | None = None
    ) -> SamplingParams:
        """Sampling parameters from what a caller sent; a value of None stands for the default.

        With `vocab_size`, token ids in `stop_token_ids` and `logit_bias` must be inside the vocabulary.
        """
        if value is None:
            return _DEFAULT
        if isinstance(value, SamplingParams):
            params = value
        elif isinstance(value, Mapping):
            params = cls(**_known_items(value))
        else:
            raise InvalidRequestError(
                f"sampling_params: got {type(value).__name__}, expected a dict or SamplingParams; "
                "pass one dict per prompt, or one for all"
            )
        if vocab_size is not None:
            params._check_vocabulary(vocab_size)
        return params

    def _check_vocabulary(self, vocab_size: int) -> None:
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias or ()),
        ):
            outside = [i for i in ids if i >= vocab_size]
            if outside:
                raise _error(
                    name,
                    outside[:8],
                    f"token ids below the vocabulary size {vocab_size}",
                    "use ids of this model's tokenizer",
                )

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken; no random number is used."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def logprob_temperature(self) -> float:
        """Temperature of the reported log-probabilities: 1 where `temperature` is below 1e-6."""
        return 1.0 if self.temperature < GREEDY_TEMPERATURE else self.temperature

    @property
    def has_penalties(self) -> bool:
        """Some penalty looks at tokens that are already there."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )

    def seed_for_sample(self, index: int, engine_seed: int, request_number: int) -> int:
        """Seed (64 bits) of sample `index` of this prompt.

        Where the caller gave a seed, a hash of it and `index`: streams of different seeds have nothing in common.
        Otherwise a hash of `engine_seed`, `request_number` (a counter of the engine's prompts) and `index`: all ranks
        that count alike draw alike.
        """
        if self.sampling_seed is not None:
            return mix64(mix64(self.sampling_seed & _MASK64) + index)
        return mix64(mix64(mix64(engine_seed & _MASK64) + request_number) + index)


def mix64(value: int) -> int:
    """splitmix64: a bijection of 64-bit integers whose outputs look independent for neighbouring inputs."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


# Checking and normalising ---------------------------------------------------------------------------------------------


def _error(name: str, got: object, expected: str, advice: str) -> InvalidRequestError:
    shown = repr(got)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InvalidRequestError(
        f"sampling parameter {name}: got {shown}, expected {expected}; {advice}"
    )


_UNSUPPORTED = {
    "json_schema": "constrained decoding",
    "regex": "constrained decoding",
    "ebnf": "constrained decoding",
    "structural_tag": "constrained decoding",
    "stop_regex": "stop patterns",
    "custom_params": "custom logit processors",
}


#: What others call a parameter; understood where a caller passes a dictionary.
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}


def _known_items(value: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for given, item in value.items():
        name = _ALIASES.get(given, given)
        if name in _NORMALISERS:
            if item is not None:
                if name in known and known[name] != item:
                    raise _error(
                        name,
                        item,
                        f"the same as elsewhere ({known[name]!r})",
                        "give it under one name",
                    )
                known[name] = item
        elif name in _UNSUPPORTED:
            if item is not None and item != {}:
                raise _error(
                    name, item, f"None, as {_UNSUPPORTED[name]} is not supported", "leave it out"
                )
        else:
            hint = best_match(str(name), _FIELDS, cutoff=0.0)
            raise InvalidRequestError(
                f"sampling parameters: got unknown name {name!r}, expected one of "
                f"{', '.join(_FIELDS)}; did you mean {hint!r}?"
            )
    return known


def asked_new_tokens(value: Mapping[str, Any]) -> Any:
    """What a caller's dictionary asks for as `max_new_tokens`, under whichever name; None: it does not say."""
    names = ("max_new_tokens", *(a for a, name in _ALIASES.items() if name == "max_new_tokens"))
    return next((value[name] for name in names if value.get(name) is not None), None)


Normaliser = Callable[[str, Any], Any]


def _number(fits: Callable[[float], bool], expected: str, advice: str) -> Normaliser:
    def normalise(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _error(name, value, expected, advice)
        number = float(value)
        if not (math.isfinite(number) and fits(number)):
            raise _error(name, value, expected, advice)
        return number

    return normalise


def _factor(name: str, value: Any) -> float:
    check = _number(lambda p: 0 < p <= 2, "a number in (0, 2]", "use 1 for no penalty")
    return max(check(name, value), _SMALLEST_FACTOR)


def _integer(low: int, high: int | None, expected: str, advice: str) -> Normaliser:
    def normalise(name: str, value: Any) -> int:
        if type(value) is not int:
            value = _as_index(name, value, expected, advice)
        if value < low or (high is not None and value > high):
            raise _error(name, value, expected, advice)
        return int(value)

    return normalise


def _as_index(name: str, value: Any, expected: str, advice: str) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise _error(name, value, expected, advice)


def _flag(name: str, value: Any) -> bool:
    if value is not True and value is not False:
        raise _error(name, value, "true or false", "pass a bool")
    return bool(value)


def _top_k(name: str, value: Any) -> int:
    expected = "an integer >= 1, or -1 for all tokens"
    value = _as_index(name, value, expected, "leave it out to keep all tokens")
    if value < -1:
        raise _error(name, value, expected, "leave it out to keep all tokens")
    return -1 if value == 0 else min(value, _MOST_KEPT)


def _seed(name: str, value: Any) -> int | None:
    if value is None:
        return None
    check = _integer(0, (1 << 63) - 1, "an integer from 0 to 2**63 - 1", "leave it out for any")
    seed: int = check(name, value)
    return seed


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    expected = "a string or a list of strings, none of them empty"
    if not isinstance(value, (list, tuple)):
        raise _error(name, value, expected, "use stop_token_ids for token ids")
    for item in value:
        if not isinstance(item, str) or not item:
            raise _error(name, item, expected, "use stop_token_ids for token ids")
    num_chars = sum(map(len, value))
    if len(value) > MAX_STOPS or num_chars > MAX_STOP_CHARS:
        raise InvalidRequestError(
            f"sampling parameter {name}: got {len(value)} strings with {num_chars} characters, expected at most "
            f"{MAX_STOPS} with {MAX_STOP_CHARS}: each is looked for after every token; use stop_token_ids, or look for "
            "them in the result"
        )
    return value if type(value) is tuple else tuple(value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    expected = "a list of token ids >= 0"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _error(name, value, expected, "pass ids of this model's tokenizer")
    return tuple(_token_id(name, item, expected) for item in value)


def _token_id(name: str, value: Any, expected: str) -> int:
    token = _as_index(name, value, expected, "pass ids of this model's tokenizer")
    if token < 0:
        raise _error(name, token, expected, "pass ids of this model's tokenizer")
    return token


def _bias(name: str, value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    expected = "a dict of token id to finite number"
    if not isinstance(value, Mapping):
        raise _error(name, value, expected, 'pass for example {"42": -5.0}')
    check = _number(lambda number: True, expected, 'pass for example {"42": -5.0}')
    bias: dict[int, float] = {}
    for key, item in value.items():
        if isinstance(key, str):
            if not key.isascii() or not key.isdigit():
                raise _error(name, key, "a token id as key", 'pass for example {"42": -5.0}')
            key = int(key)
        number = max(-_LARGEST_BIAS, min(check(name, item), _LARGEST_BIAS))
        bias[_token_id(name, key, "a token id >= 0 as key")] = number
    return bias or None


_NORMALISERS: dict[str, Normaliser] = {
    "max_new_tokens": _integer(0, None, "an integer >= 0", "use 0 to compute the prompt only"),
    "min_new_tokens": _integer(0, None, "an integer >= 0", "leave it out for no minimum"),
    "temperature": _number(lambda t: t >= 0, "a finite number >= 0", "use 0 for greedy decoding"),
    "top_p": _number(lambda p: 0 < p <= 1, "a number in (0, 1]", "use 1 to keep all tokens"),
    "top_k": _top_k,
    "min_p": _number(lambda p: 0 <= p <= 1, "a number in [0, 1]", "use 0 to keep all tokens"),
    "frequency_penalty": _number(
        lambda p: -2 <= p <= 2, "a number in [-2, 2]", "use 0 for no penalty"
    ),
    "presence_penalty": _number(
        lambda p: -2 <= p <= 2, "a number in [-2, 2]", "use 0 for no penalty"
    ),
    "repetition_penalty": _factor,
    "n": _integer(1, MAX_SAMPLES, f"an integer from 1 to {MAX_SAMPLES}", "send several requests"),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "no_stop_trim": _flag,
    "logit_bias": _bias,
    "sampling_seed": _seed,
}
_FIELDS = SamplingParams.__struct_fields__
assert set(_FIELDS) == set(_NORMALISERS)
_DEFAULT = SamplingParams()
