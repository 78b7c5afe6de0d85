"""A character tokenizer for digits, as an ordinary Hugging Face one."""

from __future__ import annotations

from typing import Any

from .task import SEPARATOR

PAD, EOS = "<pad>", "<eos>"

#: Token ids are positions here.
VOCABULARY = (PAD, EOS, SEPARATOR, *"0123456789")


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` that makes one token of each character; unknown characters become padding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS)
