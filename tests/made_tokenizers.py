"""Tokenizers of a few kinds, made from a list of tokens, for tests of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.tokenizer import Tokenizer

SPECIAL = ("<eos>", "<|im_end|>")
"""Ids 0 and 1 in all of them."""


def byte_level(tokens: Sequence[bytes]) -> Tokenizer:
    """As GPT-2's: a token is any string of bytes; ids follow those of `SPECIAL`."""
    from tokenizers import decoders, models, pre_tokenizers

    letters = _letters_of_bytes()
    names = ["".join(letters[byte] for byte in token) for token in tokens]
    return _made(
        names, models.BPE, decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    )


def byte_fallback(words: Sequence[str]) -> Tokenizer:
    """As Llama's: words, " a" and " b" among them, and a token for each byte (ids 2 to 257)."""
    from tokenizers import decoders, models, pre_tokenizers

    names = [f"<0x{byte:02X}>" for byte in range(256)] + [w.replace(" ", "\u2581") for w in words]
    decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _made(names, models.WordLevel, decoder, pre_tokenizers.Metaspace())


def word_pieces(words: Sequence[str]) -> Tokenizer:
    """As BERT's: a space before each word that does not begin with ##."""
    from tokenizers import decoders, models, pre_tokenizers

    decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return _made(list(words), models.WordLevel, decoder, pre_tokenizers.Whitespace())


def _made(names: list[str], model: Any, decoder: Any, pre_tokenizer: Any) -> Tokenizer:
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Inner
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *names])}
    assert len(vocabulary) == len(names) + len(SPECIAL), "tokens must differ"
    inner = Inner(model(vocabulary, *([[]] if model is models.BPE else ["<unk>"])))
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    made = Tokenizer.__new__(Tokenizer)
    made._tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[0])
    return made


def _letters_of_bytes() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary (as GPT-2 defines it)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + i) for i, byte in enumerate(hidden)
    }
