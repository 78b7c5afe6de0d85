"""Which tokens end a sequence, and that ids which no model can draw are none of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from rollout import Engine
from rollout.tokenizer import end_token_ids

PROMPT = [5, 9, 2]


def write(folder: Path, config: Any, generation: Any) -> None:
    """Name these end tokens in a folder's two files."""
    file = folder / "config.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, "eos_token_id": config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))


@pytest.mark.parametrize(
    ("config", "generation", "inside", "outside"),
    [
        (2, [7, 2, 9], {2, 7, 9}, []),
        (None, None, set(), []),
        (-1, 99, {99}, [-1]),
        ([100, 3], 151_643, {3}, [100, 151_643]),
    ],
)
def test_end_tokens_come_from_both_files_and_lie_in_the_vocabulary(
    tmp_path: Path, config: Any, generation: Any, inside: set[int], outside: list[int]
) -> None:
    write(tmp_path, config, generation)
    assert end_token_ids(tmp_path, None, vocab_size=100) == (inside, outside)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """The last token of the vocabulary and two that it does not have end a sequence, says the configuration."""
    copy = tmp_path_factory.mktemp("end") / "model"
    shutil.copytree(tiny_checkpoint("qwen3", head_dim=32), copy)
    write(copy, -1, [288, 151_643])
    return copy


@pytest.mark.parametrize("options", [{}, {"executor": "local", "tp_size": 2}])
def test_end_ids_outside_the_vocabulary_fail_nothing_and_ban_nothing(
    folder: Path, options: dict[str, Any]
) -> None:
    last = {"logit_bias": {287: 100.0}, "max_new_tokens": 3, "temperature": 0.0}
    with Engine(folder, kv_cache_bytes=1 << 20, **options) as engine:
        result = engine.generate(
            input_ids=[PROMPT, PROMPT], sampling_params=[{**last, "min_new_tokens": 3}, last]
        )
    assert [r["output_ids"] for r in result] == [[287] * 3] * 2


def test_ids_that_are_left_out_are_named_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        Engine(folder, kv_cache_bytes=1 << 20) as engine,
    ):
        for _ in range(2):
            engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 1})
    said = [r.getMessage() for r in caplog.records if "end-of-sequence ids" in r.getMessage()]
    assert len(said) == 1 and "[-1, 288, 151643]" in said[0]


def test_a_generation_config_with_an_end_id_of_no_token_is_understood(folder: Path) -> None:
    config = GenerationConfig(eos_token_id=[-1, 7], max_new_tokens=2)
    with (
        Engine(folder, kv_cache_bytes=1 << 20) as engine,
        pytest.warns(UserWarning, match="end-of-sequence ids"),
    ):
        result = engine.generate(input_ids=PROMPT, sampling_params=config)
    ended = result["output_ids"][-1] == 7
    assert result["meta_info"]["finish_reason"]["type"] == ("stop" if ended else "length")
    assert ended or len(result["output_ids"]) == 2
