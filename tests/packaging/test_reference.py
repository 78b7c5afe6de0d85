"""docs/reference.md is what the code says: signatures, defaults, keys of results, errors."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rollout
import rollout.errors
import weight_sync
import weight_sync.errors
from rollout import Engine, SamplingParams
from weight_sync import WeightPublisher


@pytest.fixture
def writer(checkout: Path) -> Any:
    spec = importlib.util.spec_from_file_location(
        "write_reference", checkout / "docs" / "write_reference.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(checkout: Path) -> str:
    return (checkout / "docs" / "reference.md").read_text()


def test_the_page_is_what_the_code_says(checkout: Path) -> None:
    script = checkout / "docs" / "write_reference.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("cls", [Engine, WeightPublisher])
def test_every_option_and_call_is_on_the_page_with_its_default(page: str, cls: type) -> None:
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not None:
            assert f"| `{name}` | `{parameter.default!r}` |" in page, name
    for name in dir(cls):
        call = inspect.getattr_static(cls, name)
        if inspect.isfunction(call) and not name.startswith(("_", "async_", "weight_channel")):
            assert f"`{name}(" in page, name


def test_every_error_class_is_on_the_page(page: str) -> None:
    for module in (rollout.errors, weight_sync.errors):
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, Exception) and not name[0] == "_":
                if value.__module__.startswith(("rollout", "weight_sync")):
                    assert re.search(rf"^\| `{name}` \| ", page, re.MULTILINE), name


def test_the_keys_of_results_are_those_of_an_engine(
    writer: Any, tiny_checkpoint: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [1],
        "return_token_times": True,
        "flat_logprobs": True,
        "return_token_versions": True,
        "return_prompt_token_ids": True,
        "return_routed_experts": True,
    }
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    checkpoint = tiny_checkpoint("qwen3_moe", **mixture)
    sampling = {"max_new_tokens": 2, "n": 2}
    with Engine(checkpoint, kv_cache_bytes=1 << 20, enable_return_routed_experts=True) as engine:
        plain = engine.generate("one", {"max_new_tokens": 2})
        asked = engine.generate("one", sampling, **options)[0]
        *_, streamed = engine.generate("one", sampling, stream=True)
        ended = engine.generate("one", {"max_new_tokens": 2}, return_prompt_token_ids=True)
        ended["meta_info"]["finish_reason"] = {"type": "abort", "message": "early"}
        (resumed,) = engine.resume([ended], {"max_new_tokens": 3})
    always = {
        kind: {key for key, row in keys.items() if row[0] == writer.ALWAYS}
        for kind, keys in (("result", writer.RESULT), ("meta", writer.META))
    }
    assert set(plain) == always["result"]
    assert set(plain["meta_info"]) == always["meta"]
    assert set(asked) | {"index"} == set(writer.RESULT)
    assert set(resumed["meta_info"]) == always["meta"] | {"num_resumes"}
    assert set(asked["meta_info"]) | set(resumed["meta_info"]) == set(writer.META)
    assert set(streamed) == always["result"] | {"index"}
    # Each of the others comes with the option that the page names.
    for key, row in writer.META.items():
        assert row[0] == writer.ALWAYS or row[0].strip("`") in {*options, "resume"}, key


def test_a_name_that_is_missing_or_too_many_is_an_error(writer: Any) -> None:
    writer.check_same("X", {"a": ""}, ["a"])
    with pytest.raises(SystemExit, match=r"X lacks \['b'\], and has \['a'\]"):
        writer.check_same("X", {"a": ""}, ["b"])


def test_names_that_are_side_by_side_with_others_are_there(checkout: Path) -> None:
    """The column "here" of docs/coming_from.md."""
    text = (checkout / "docs" / "coming_from.md").read_text()
    known = {
        *dir(Engine),
        *inspect.signature(Engine.__init__).parameters,
        *inspect.signature(Engine.generate).parameters,
        *inspect.signature(Engine.update_weights_from_tensor).parameters,
        *dir(SamplingParams),
        *dir(rollout),
        *dir(weight_sync),
        *("meta_info", "prompt_token_ids"),
    }
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    # The name itself, or that of a call or of an argument.
    found = [re.match(r"\w+", code) for cell in cells for code in re.findall(r"`([^`\"]+)", cell)]
    names = {match.group() for match in found if match is not None}
    assert len(names) > 40
    assert names - known == set()
