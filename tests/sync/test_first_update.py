"""An engine that is started with random weights does not generate before it has been given real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from versions import Reference, version_weights

from rollout import Engine, RolloutPool
from rollout.errors import NoUpdateYetError
from weight_sync import WeightPublisher
from weight_sync.errors import TornWeightsError

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
PROMPT = [5, 9, 2]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)


def ask(engine: Any) -> Any:
    return engine.generate(input_ids=PROMPT, sampling_params=GREEDY, return_logprob=True)


@pytest.mark.parametrize("options", [{}, {"executor": "local", "tp_size": 2, "num_threads": 1}])
def test_random_weights_generate_nothing_until_a_complete_update_has_come(
    folder: Path, options: dict[str, Any]
) -> None:
    weights = version_weights(folder, 1)
    with Engine(folder, load_format="dummy", kv_cache_bytes=2 << 20, **options) as engine:
        with pytest.raises(NoUpdateYetError, match="await_first_update=False"):
            ask(engine)
        with pytest.raises(NoUpdateYetError):
            engine.score([5], [[6]], [7])
        assert str(engine.status().torn).startswith("no update has come yet")
        with WeightPublisher(engine) as publisher:
            first = dict(list(weights.items())[:3])
            publisher.publish(first, strict=False)
            with pytest.raises(NoUpdateYetError, match="tensors were pushed"):
                ask(engine)
            publisher.publish(weights)
        assert engine.status().torn is None
        assert Reference(folder).at(1).greedy_problem(PROMPT, ask(engine)) is None


def test_the_first_weights_may_come_bucket_by_bucket_and_without_a_label(folder: Path) -> None:
    with Engine(folder, load_format="dummy", kv_cache_bytes=2 << 20) as engine:
        for name, tensor in version_weights(folder, 2).items():
            with pytest.raises(TornWeightsError):
                ask(engine)
            engine.update_weights_from_tensor([(name, tensor)])
        assert Reference(folder).at(2).greedy_problem(PROMPT, ask(engine)) is None


def test_whoever_wants_random_tokens_says_so(folder: Path) -> None:
    with Engine(
        folder, load_format="dummy", await_first_update=False, kv_cache_bytes=2 << 20
    ) as engine:
        assert len(ask(engine)["output_ids"]) == 8
    with (
        Engine(folder, await_first_update=True, kv_cache_bytes=2 << 20) as engine,
        pytest.raises(NoUpdateYetError),
    ):
        ask(engine)


def test_a_pool_waits_for_its_first_update_too(folder: Path) -> None:
    with RolloutPool(
        folder,
        num_replicas=2,
        load_format="dummy",
        num_threads=1,
        kv_cache_bytes=2 << 20,
    ) as pool:
        with pytest.raises(NoUpdateYetError):
            ask(pool)
        with WeightPublisher(pool) as publisher:
            publisher.publish(version_weights(folder, 3))
        assert Reference(folder).at(3).greedy_problem(PROMPT, ask(pool)) is None
