"""What somebody gets wrong on the first day is answered in one line that says what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import Engine
from rollout.errors import ConfigError, InvalidRequestError
from weight_sync import ManifestMismatch, WeightPublisher
from weight_sync.errors import EngineDiedError

SMALL = {"kv_cache_bytes": 4 << 20, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, **SMALL) as engine:
        yield engine


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def one_line(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"executor": "multiprocess"},
            ("executor: got 'multiprocess'", "'inline', 'local', 'ray'"),
        ),
        ({"load_format": "pt"}, ("load_format: got 'pt'", "'safetensors'", "'dummy'")),
        ({"kv_policy": "drop"}, ("kv_policy: got 'drop'", "'recompute'")),
        ({"tp_size": "two"}, ("tp_size: got 'two'", "expected `int`")),
        ({"tensor_paralel_size": 2}, ("'tensor_paralel_size'", "did you mean 'tp_size'?")),
    ],
)
def test_an_option_with_a_wrong_value(
    folder: Path, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as refused:
        Engine(folder, **options)
    one_line(refused.value, *parts)


def test_a_start_that_takes_too_long_names_its_limit(folder: Path) -> None:
    with pytest.raises(EngineDiedError) as late:
        Engine(folder, executor="local", start_timeout_s=0.01, **SMALL)
    one_line(late.value, "within 0.01 s", "raise start_timeout_s")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"prompt": "a", "max_new_tokens": 3}, ("sampling_params={'max_new_tokens': 3}",)),
        ({"prompt": "a", "temperature": 0.5}, ("sampling_params={'temperature': 0.5}",)),
        ({"prompt": [{"role": "user", "content": "hi"}]}, ("got dict", "apply_chat_template")),
        ({"prompt": 3}, ("got int", "input_ids")),
    ],
)
def test_a_request_of_another_engines_kind(
    engine: Engine, arguments: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        engine.generate(**arguments)
    one_line(refused.value, *parts)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        (
            "http://127.0.0.1:30000",
            ("the URL of a server", "engine.listen", "HttpServerEngineAdapter"),
        ),
        ("127.0.0.1:30000", ("got '127.0.0.1:30000'", "engine.address")),
        ("checkpoints/qwen3", ("got 'checkpoints/qwen3'", "engine.address")),
        (None, ("got NoneType", "engine.address")),
        (["ipc:///tmp/x/socket", 3], ("got int '3'", "engine.address")),
    ],
)
def test_a_publisher_to_what_is_no_engine(target: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="not an engine") as refused:
        WeightPublisher(target)
    one_line(refused.value, *parts)


@pytest.mark.parametrize("kind", [None, "checkpoints/step-3", Path("x"), torch.zeros(3)])
def test_a_publisher_of_what_is_no_named_tensors(engine: Engine, kind: Any) -> None:
    with (
        WeightPublisher(engine) as publisher,
        pytest.raises(ManifestMismatch) as refused,
    ):
        publisher.publish(kind)
    one_line(refused.value, "named_tensors: got", "a module, a mapping", "update_weights_from_disk")


def test_names_that_the_engine_does_not_know_are_listed_and_its_own_counted(
    engine: Engine, weights: dict[str, torch.Tensor]
) -> None:
    with WeightPublisher(engine) as publisher:
        with pytest.raises(ManifestMismatch) as refused:
            publisher.publish({"x": torch.zeros(2), "y": torch.zeros(2)})
        assert str(refused.value).splitlines() == [
            "3 problems with the trainer's tensors; nothing was written:",
            "  x: unknown to the engine",
            "  y: unknown to the engine",
            f"  all {len(weights)} of the engine's, such as model.embed_tokens.weight float32 [288, 64]: missing",
            "send Hugging Face names in the engine's shapes, each once, all of them (strict=False allows a part)",
        ]
        name = "model.layers.0.self_attn.q_proj.weight"
        with pytest.raises(ManifestMismatch) as refused:
            publisher.publish({**weights, name: weights[name][:1]})
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("1 problem with")
    assert lines[1].startswith(f"  {name}: got shape [1, 64], expected [") and len(lines) == 3
