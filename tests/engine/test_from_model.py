"""An engine for a model that lives in the trainer's memory and has no folder."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout import Engine
from rollout.errors import ConfigError
from weight_sync import fingerprint

GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    return ids[0, len(prompt) :].tolist()


def test_it_serves_the_model_as_it_is_and_writes_no_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    with Engine.from_model(
        model, tokenizer, weight_version="start", kv_cache_bytes=4 << 20
    ) as engine:
        own = Path(engine.config.model_path)
        assert (own / "config.json").is_file() and not list(own.rglob("*.safetensors"))
        assert engine.get_weight_version() == "start"
        assert engine.weights_fingerprint() == fingerprint(model)
        result = engine.generate(input_ids=[5, 9, 2], sampling_params=GREEDY)
        params = {**GREEDY, "min_new_tokens": 6}
        result = engine.generate(input_ids=[5, 9, 2], sampling_params=params)
        assert result["output_ids"] == greedy(model, [5, 9, 2])
        assert engine.generate("the", GREEDY)["text"]
    assert not own.exists()


def test_what_cannot_be_served_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match="expected a transformers model"):
        Engine.from_model(torch.nn.Linear(2, 2))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="tp_size"):
        Engine.from_model(model, tp_size=0)
    assert not list(tmp_path.glob("rollout-model-*"))


def test_an_engine_that_is_dropped_takes_its_folder_with_it(folder: Path) -> None:
    model = torch.nn.parallel.DataParallel(AutoModelForCausalLM.from_pretrained(folder))
    engine = Engine.from_model(model, kv_cache_bytes=4 << 20)
    own = Path(engine.config.model_path)
    assert own.is_dir() and engine.version == 1
    del engine
    gc.collect()
    assert not own.exists()
