"""Text in, text out: the tokenizer, and the end tokens of a checkpoint.

The engine loop works on token ids alone. It decodes only for requests that have stop strings (`stop_strings`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, InvalidRequestError

if TYPE_CHECKING:
    from .token_bounds import TokenBound

REPLACEMENT = "\ufffd"
"""What bytes that are no character are shown as."""


class Tokenizer:
    """A Hugging Face tokenizer, loaded from a folder; every engine process has its own."""

    def __init__(self, path: str | Path) -> None:
        try:
            self._tokenizer: Any = _load(Path(path))
        except Exception as error:  # Whatever transformers makes of a file that it does not expect.
            raise CheckpointError(
                f"cannot load a tokenizer from {path}: {error}; pass tokenizer_path=..., or "
                "skip_tokenizer_init=True to work on token ids"
            ) from error

    @classmethod
    def around(cls, inner: Any) -> Tokenizer:
        """One for a Hugging Face tokenizer that is loaded already."""
        found = cls.__new__(cls)
        found._tokenizer = inner
        return found

    @property
    def inner(self) -> Any:
        """The Hugging Face tokenizer itself."""
        return self._tokenizer

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end token, None if it has none."""
        return self._tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, None if it has none."""
        return self._tokenizer.pad_token_id

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of `text`, with the tokenizer's own special tokens or, if `add_special_tokens` is False, without.

        None: as True, but where `text` has its begin token already, as from a chat template, it gets no second one.
        """
        if add_special_tokens is not None:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        ids = list(self._tokenizer.encode(text))
        begin = self._tokenizer.bos_token
        if begin and text.lstrip().startswith(begin):
            own = list(self._tokenizer.encode(text, add_special_tokens=False))
            if ids[: len(own) + 1] == [self._tokenizer.bos_token_id, *own]:
                return ids[1:]
        return ids

    def least_tokens(self, text: str) -> int:
        """As many tokens as `text` has at least, which is found without encoding it; 0 where nothing is known."""
        return 0 if self._bound is None else self._bound.least(text)

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, spaces: bool = True
    ) -> str:
        """Text of `token_ids` as it continues other text: a space at its beginning stays, and all that is between."""
        start, text = self._start or ([], "")
        ids = [*start, *token_ids]
        if self._backend is not None:
            whole: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            whole = self._tokenizer.decode(
                ids,
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces,
                clean_up_tokenization_spaces=False,
            )
        return whole[len(text) :]

    def token_text(self, token_id: int) -> str:
        """Text of one token, as log-probability entries show it."""
        return self.decode([token_id], skip_special_tokens=False)

    @cached_property
    def _bound(self) -> TokenBound | None:
        from .token_bounds import bound_of

        plain = self._is_plain("encode", "_encode_plus", "_get_padding_truncation_strategies")
        return bound_of(self._tokenizer.backend_tokenizer) if plain else None

    @cached_property
    def _backend(self) -> Any:
        """What transformers would ask in the end, in a fifth of the time; None: the class decodes in its own way."""
        plain = self._is_plain("decode", "_decode")
        return self._tokenizer.backend_tokenizer if plain else None

    def _is_plain(self, *methods: str) -> bool:
        """These are transformers' own, which hand everything to the backend."""
        from transformers import PreTrainedTokenizerFast as Fast

        kind = type(self._tokenizer)
        return issubclass(kind, Fast) and all(
            getattr(kind, name) is getattr(Fast, name) for name in methods
        )

    @cached_property
    def has_byte_fallback(self) -> bool:
        """Bytes may be tokens, of which one that is no part of a character spoils the others that are next to it."""
        ids = self._tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>"])
        return None not in ids and self._tokenizer.decode(ids) == "\u00e9"

    @cached_property
    def _start(self) -> tuple[list[int], str] | None:
        """What to decode before a continuation, and its text; None: nothing is needed.

        Tokenizers in the way of sentencepiece take away the space that the first piece begins with.
        """
        try:
            ids = list(self._tokenizer.encode("a b", add_special_tokens=False))
        except Exception:  # tokenizers raises no other type for a text that a vocabulary lacks
            return None
        if len(ids) < 2 or self._tokenizer.decode(ids) != "a b":
            return None
        piece = self._tokenizer.convert_ids_to_tokens(ids[-1])
        if not piece.startswith("\u2581") or self._tokenizer.decode(ids[-1:]) == " b":
            return None
        return ids[:-1], self._tokenizer.decode(ids[:-1])


#: Any of these makes a folder one that a tokenizer can be loaded from.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "tekken.json"),
)


def check_tokenizer_files(path: str | Path) -> None:
    """`CheckpointError` for a folder without a tokenizer: transformers may make up an empty one there."""
    if not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"no tokenizer in {path}: got none of its files, expected one of {', '.join(TOKENIZER_FILES)}; save it "
            "there (tokenizer.save_pretrained), pass tokenizer_path=..., or skip_tokenizer_init=True to use token ids"
        )


def end_token_ids(
    model_path: str | Path, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[frozenset[int], list[int]]:
    """Tokens that end a sequence: those of `generation_config.json`, `config.json` and the tokenizer.

    Also those of them that no model of this vocabulary can draw, such as -1; they are left out of the first.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        if file.is_file():
            value = json.loads(file.read_text()).get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            found.update(token for token in ids if type(token) is int)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    inside = frozenset(token for token in found if 0 <= token < vocab_size)
    return inside, sorted(found - inside)


def pad_token_id(model_path: str | Path) -> int | None:
    """The padding token according to the folder's `config.json`; None: it names none."""
    file = Path(model_path) / "config.json"
    value = json.loads(file.read_text()).get("pad_token_id") if file.is_file() else None
    return value if isinstance(value, int) else None


def encode_prompts(
    tokenizer: Tokenizer | None,
    prompts: Sequence[str],
    add_special_tokens: bool | None = None,
    *,
    context_length: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt; `InvalidRequestError` where there is no tokenizer, or a prompt is empty or no text.

    add_special_tokens: as `Tokenizer.encode`. context_length: a prompt that certainly has more tokens is refused, too,
    before it is encoded, which takes seconds for megabytes; whoever asks must still count those of the others.
    """
    if tokenizer is None:
        raise InvalidRequestError(
            "cannot encode a text prompt: got skip_tokenizer_init=True, expected a tokenizer; pass input_ids instead"
        )
    encoded = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            is_chat = isinstance(prompt, Mapping) and "role" in prompt
            advice = (
                "render a chat first, with the tokenizer's apply_chat_template(..., tokenize=False)"
            )
            raise InvalidRequestError(
                f"prompt {i}: got {type(prompt).__name__}, expected str; "
                + (advice if is_chat else "pass token ids as input_ids")
            )
        if not is_unicode(prompt):
            raise InvalidRequestError(
                f"prompt {i}: got half of a surrogate pair, expected text; decode it with errors='replace'"
            )
        # A token covers at least one byte, so most prompts need no closer look.
        if context_length is not None and 4 * len(prompt) > context_length:
            least = tokenizer.least_tokens(prompt)
            if least > context_length:
                raise InvalidRequestError(
                    f"prompt {i}: got at least {least} tokens, expected fewer than the context length "
                    f"{context_length}; shorten it or start the engine with a larger context_length"
                )
        ids = tokenizer.encode(prompt, add_special_tokens)
        if not ids:
            raise InvalidRequestError(
                f"prompt {i}: got no tokens, expected at least one; prompts must not be empty"
            )
        encoded.append(ids)
    return encoded


def is_unicode(text: str) -> bool:
    """It has no half of a surrogate pair, and so can be written down as bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load(path: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except AttributeError:
        # It may read `config.json` on the way, and knows "bfloat16" but not "torch.bfloat16", which older tools wrote.
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for key in ("dtype", "torch_dtype"):
            if isinstance(raw.get(key), str):
                raw[key] = raw[key].removeprefix("torch.")
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        return AutoTokenizer.from_pretrained(str(path), config=config)
