"""Errors: one place, one type wherever the engine runs, and they can be pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout.errors
import weight_sync.errors
from rollout import Engine
from rollout.errors import ERRORS, NonFiniteLogitsError, NoProgressError, RolloutError, typed

OPTIONS = {"kv_cache_bytes": 2 << 20, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)


@pytest.fixture(scope="module", params=["inline", "local"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(folder, executor=request.param, **OPTIONS) as engine:
        yield engine


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_survives_pickle_and_is_in_one_place(name: str) -> None:
    kind = ERRORS[name]
    error = pickle.loads(pickle.dumps(kind("what, got, expected")))
    assert type(error) is kind and str(error) == "what, got, expected"
    if kind.__module__ != "builtins":
        assert getattr(rollout.errors, name) is kind and name in rollout.errors.__all__


def test_the_errors_of_weight_updates_are_all_there() -> None:
    assert set(weight_sync.errors.ERRORS) <= set(rollout.errors.__all__)


def test_rows_of_bad_logits_survive_pickle() -> None:
    error = NonFiniteLogitsError("rows 1, 3")
    error.rows = (1, 3)
    assert pickle.loads(pickle.dumps(error)).rows == (1, 3)


def test_an_error_that_callers_do_not_know_is_named_in_one_that_they_do() -> None:
    known = RolloutError("known")
    assert typed(known, "Generate") is known
    assert type(typed(KeyError("x"), "Generate")) is rollout.errors.UnexpectedError
    assert "Generate failed with KeyError: 'x'" in str(typed(KeyError("x"), "Generate"))


def test_logits_that_are_no_distribution_have_one_error_everywhere(engine: Engine) -> None:
    norm = [("model.norm.weight", torch.full((64,), float("nan")))]
    good = engine.get_weights_by_name("model.norm.weight")
    engine.update_weights_from_tensor(norm, check_finite=False)
    params = {"max_new_tokens": 2, "temperature": 0.0}
    with pytest.raises(NonFiniteLogitsError, match="check the weights"):
        engine.generate(input_ids=[5, 6], sampling_params=params)
    engine.update_weights_from_tensor([("model.norm.weight", torch.tensor(good))])
    assert engine.generate(input_ids=[5, 6], sampling_params=params)["output_ids"]


def test_constructor_errors_have_one_type_everywhere(folder: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "context_length": 1 << 30}
    messages = set()
    for executor in ("inline", "local"):
        with pytest.raises(rollout.errors.ConfigError) as caught:
            Engine(folder, executor=executor, **options)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_a_step_that_hangs_fails_what_waits_for_it_and_what_comes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    with Engine(folder, progress_timeout_s=2.0, **OPTIONS) as engine:
        core, go_on = engine._executor._core, threading.Event()  # type: ignore[attr-defined]
        launch = core.runner.launch
        monkeypatch.setattr(core.runner, "launch", lambda *step: go_on.wait(20) and launch(*step))
        for _ in range(2):
            with pytest.raises(NoProgressError, match="hangs"):
                engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 2})
        go_on.set()
        params = {"max_new_tokens": 2, "ignore_eos": True}
        result = engine.generate(input_ids=[5], sampling_params=params)
        assert len(result["output_ids"]) == 2


def test_a_pause_that_outlasts_the_patience_ends_what_waits_with_its_reason(folder: Path) -> None:
    with Engine(folder, progress_timeout_s=0.3, **OPTIONS) as engine:
        engine.pause_generation("in_place", lease_s=60)
        result = engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 2})
        message = result["meta_info"]["finish_reason"]["message"]
        assert "no step for 0.3 s" in message and "until" in message
