"""Labels, limits, delays and noise: what may be done to an engine while it runs, on every executor and in a pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import Engine, RolloutPool
from rollout.errors import InvalidRequestError, RolloutError
from weight_sync.errors import ManifestMismatch, TornWeightsError, WeightUpdateError

ASK = {
    "input_ids": [5, 6, 7],
    "sampling_params": {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True},
}
OPTIONS = {"kv_cache_bytes": 4 << 20, "num_threads": 1}
START: dict[str, Callable[[Path], Any]] = {
    "inline": lambda folder: Engine(folder, **OPTIONS),
    "two ranks": lambda folder: Engine(folder, executor="local", tp_size=2, **OPTIONS),
    "pool": lambda folder: RolloutPool(folder, num_replicas=2, **OPTIONS),
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module", params=START)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with START[request.param](folder) as engine:
        yield engine


def test_the_weights_that_serve_get_another_label_and_stay_what_they_are(engine: Engine) -> None:
    version, fingerprint = engine.version, engine.weights_fingerprint()
    engine.update_weight_version("seventeen")
    assert (engine.version, engine.weights_fingerprint()) == (version, fingerprint)
    assert engine.get_weight_version() == "seventeen"
    meta = engine.generate(**ASK)["meta_info"]
    span = {"version": "seventeen", "number": version, "start": 0, "end": 6}
    assert meta["weight_version"] == "seventeen" and meta["weight_versions"] == [span]
    for label in ("", "x" * 513):
        with pytest.raises(InvalidRequestError, match="new_version"):
            engine.update_weight_version(label)


def test_a_label_that_comes_between_two_tokens_begins_a_span(folder: Path) -> None:
    with Engine(folder, **OPTIONS) as engine:
        params = {"max_new_tokens": 40, "ignore_eos": True}
        engine.slow_down(0.01)
        chunks = engine.generate(input_ids=[1], sampling_params=params, stream=True)
        next(chunks)
        engine.begin_weight_update()  # A session that is under way is not in its way.
        engine.update_weight_version("b")
        engine.abort_weight_update()
        spans = [*chunks][-1]["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["0", "b"]
    assert spans[0]["start"] == 0 and spans[0]["end"] == spans[1]["start"]
    assert spans[1]["end"] == 40 and {span["number"] for span in spans} == {0}


def test_a_failed_update_leaves_the_label(folder: Path, reference_model: Any) -> None:
    with Engine(folder, **OPTIONS) as engine:
        engine.update_weight_version("mine")
        with pytest.raises(ManifestMismatch):
            engine.update_weights_from_tensor(
                {"nobody": next(reference_model(folder).parameters())}
            )
        assert engine.get_weight_version() == "mine"
        engine.publish(reference_model(folder))
        assert engine.get_weight_version() == "1"


def test_a_delay_comes_before_every_step_and_changes_no_result(engine: Engine) -> None:
    expected = engine.generate(**ASK)["output_ids"]
    engine.slow_down(0.05)
    start = time.monotonic()
    assert engine.generate(**ASK)["output_ids"] == expected
    assert time.monotonic() - start >= 6 * 0.05  # As many steps as tokens.
    engine.slow_down(None)
    for value in (-1, 11, float("nan"), "1"):
        with pytest.raises(InvalidRequestError, match="forward_sleep_time"):
            engine.slow_down(value)  # type: ignore[arg-type]


def test_limits_are_lowered_and_raised_again_and_change_no_result(engine: Engine) -> None:
    prompts = [[i, 2 * i, 7, *range(i)] for i in range(12)]
    ask = {"input_ids": prompts, "sampling_params": ASK["sampling_params"]}
    expected = [result["output_ids"] for result in engine.generate(**ask)]
    resolved = engine.status().resolved
    names = ("max_running_requests", "chunked_prefill_size")
    before = {name: resolved[name] for name in names}
    engine.set_internal_state({"max_running_requests": 2, "chunked_prefill_size": 4})
    found = engine.status().resolved
    assert (found["max_running_requests"], found["chunked_prefill_size"]) == (2, 4)
    assert [result["output_ids"] for result in engine.generate(**ask)] == expected
    for values, word in (
        ({"max_running_requests": 10**6}, "at most"),
        ({"max_running_requests": 0}, "max_running_requests"),
        ({"chunked_prefill_size": "many"}, "chunked_prefill_size"),
        ({"max_num_seqs": 3}, "max_running_requests"),
    ):
        with pytest.raises(InvalidRequestError, match=word):
            engine.set_internal_state(values)
    engine.set_internal_state(before)
    assert {name: engine.status().resolved[name] for name in names} == before


def test_running_requests_beyond_a_new_limit_wait_and_are_not_lost(folder: Path) -> None:
    with Engine(folder, **OPTIONS) as engine:
        params = {"max_new_tokens": 60, "ignore_eos": True, "n": 8, "sampling_seed": 3}
        expected = [
            r["output_ids"] for r in engine.generate(input_ids=[1, 2], sampling_params=params)
        ]
        engine.slow_down(0.01)
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.extend(engine.generate(input_ids=[1, 2], sampling_params=params))
        )
        thread.start()
        while engine.status().num_running < 8:
            time.sleep(0.005)
        engine.set_internal_state({"max_running_requests": 3})
        status = engine.status()
        assert status.num_running <= 3
        engine.slow_down(0)
        thread.join(60)
    assert [result["output_ids"] for result in found] == expected


def test_weights_are_reset_to_noise_and_a_complete_update_brings_them_back(
    engine: Engine, reference_model: Any, folder: Path
) -> None:
    model = reference_model(folder)
    engine.publish(model)
    expected, before = engine.generate(**ASK)["output_ids"], engine.weights_checksums()
    names = dict(model.named_parameters())
    assert engine.reset_weights() > 0
    with pytest.raises(TornWeightsError, match="noise") as refused:
        engine.generate(**ASK)
    assert str(refused.value).count("push a complete update") <= 1
    part = {"model.norm.weight": names["model.norm.weight"]}
    engine.update_weights_from_tensor(part)  # Not enough.
    with pytest.raises(TornWeightsError):
        engine.generate(**ASK)
    after = engine.weights_checksums()
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before if name not in part)
    engine.publish(model)
    assert engine.weights_checksums() == before
    assert engine.generate(**ASK)["output_ids"] == expected


def test_weights_are_not_reset_under_an_update(folder: Path) -> None:
    with Engine(folder, **OPTIONS) as engine:
        before = engine.weights_fingerprint()
        engine.begin_weight_update()
        with pytest.raises(RolloutError, match="under way"):
            engine.reset_weights()
        engine.abort_weight_update()
        assert engine.weights_fingerprint() == before
        engine.release_memory_occupation(["weights"], keep_weights=True)
        with pytest.raises(RolloutError, match="released"):
            engine.reset_weights()


def test_an_update_that_begins_while_weights_are_reset_does_not_make_a_version_of_the_noise(
    folder: Path, reference_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reference_model(folder)
    part = {"model.norm.weight": dict(model.named_parameters())["model.norm.weight"]}
    with Engine(folder, **OPTIONS, executor="inline") as engine:
        receiver = engine._executor._core.receiver  # type: ignore[attr-defined]
        lose, refused = receiver.lose_weights, []

        def update_meanwhile(reason: str) -> None:
            def update() -> None:
                with pytest.raises(WeightUpdateError, match="being reset"):
                    engine.update_weights_from_tensor(part)
                refused.append(True)

            thread = threading.Thread(target=update)
            thread.start()
            thread.join(5)
            lose(reason)

        monkeypatch.setattr(receiver, "lose_weights", update_meanwhile)
        engine.reset_weights()
        assert refused and engine.version == 0
        with pytest.raises(TornWeightsError, match="noise"):
            engine.generate(**ASK)
        monkeypatch.undo()
        engine.publish(model)
        assert engine.generate(**ASK)["output_ids"]


def test_a_replica_that_comes_later_has_the_label_the_limits_and_the_delay(folder: Path) -> None:
    with RolloutPool(folder, num_replicas=1, **OPTIONS) as pool:
        pool.update_weight_version("named")
        pool.set_internal_state({"max_running_requests": 5})
        pool.add_replica()
        addresses = [replica.address for replica in pool.replicas()]
        for address in addresses:
            with Engine.connect(address) as engine:
                status = engine.status()
                assert status.weight_version == "named"
                assert status.resolved["max_running_requests"] == 5
