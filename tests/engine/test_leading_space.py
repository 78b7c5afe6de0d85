"""The space between a prompt and its continuation, with tokenizers that take the first one away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_tokenizers import word_pieces

from rollout.stop_strings import StopStringWatcher
from rollout.tokenizer import Tokenizer


@pytest.fixture
def like_llama_2(tmp_path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\u2581hello", "\u2581world", "\u2581a", "\u2581b", "ly"]
    inner = Inner(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    return Tokenizer(tmp_path)


def test_a_continuation_keeps_its_leading_space(like_llama_2: Tokenizer) -> None:
    assert like_llama_2.inner.decode([4, 5]) == "world a"
    assert like_llama_2.decode([4, 5], skip_special_tokens=True) == " world a"
    assert like_llama_2.decode([7, 5], skip_special_tokens=True) == "ly a"
    assert like_llama_2.decode([], skip_special_tokens=True) == ""
    assert like_llama_2.token_text(4) == " world"


def test_a_stop_string_may_begin_with_the_leading_space(like_llama_2: Tokenizer) -> None:
    watcher = StopStringWatcher(like_llama_2, [" world"])
    match = watcher.add(4)
    assert match is not None and match.text_end == (1, 6)


def test_byte_level_tokenizers_are_left_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(tiny_checkpoint("qwen3", head_dim=32))
    for text in (" world a", "the", "\u00e9\u4e16", "a\nb "):
        ids = tokenizer.encode(text, False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_vocabulary_without_letters_decodes_all_the_same() -> None:
    digits = word_pieces(["1", "2", "##3"])
    assert digits.decode([2, 4, 3], skip_special_tokens=True) == "13 2"
