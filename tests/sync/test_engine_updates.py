"""Weight updates through `Engine`, while it generates: in this process and with the engine in a child process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import weight_sync
from rollout import Engine
from weight_sync.errors import (
    FingerprintMismatch,
    ManifestMismatch,
    SessionBusy,
    SessionError,
)
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.receiver.commit import WeightCommit

PROMPTS = [[5, 9, 2], [7] * 40, list(range(20, 53))]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module", params=["inline", "inline, one step ahead", "local"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    executor, _, ahead = request.param.partition(", ")
    with Engine(
        folder, executor=executor, overlap=bool(ahead), kv_cache_bytes=4 << 20, num_threads=1
    ) as engine:
        yield engine


@pytest.fixture
def trainer(folder: Path, reference_model: Callable[[Path], Any]) -> Any:
    """The trainer's model: a copy of the checkpoint that a test may change."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(model: Any, seed: int) -> None:
    """Stands for an optimiser step: every parameter moves, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise)


def check_parity(engine: Engine, model: Any) -> None:
    """Greedy tokens and log-probabilities are those of the trainer's model."""
    results = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY, return_logprob=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = prompt + result["output_ids"]
        with torch.no_grad():
            rows = torch.log_softmax(
                model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float(), -1
            )
        assert rows.argmax(-1).tolist() == result["output_ids"]
        expected = rows.max(-1).values.tolist()
        got = [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
        assert got == pytest.approx(expected, abs=1e-4)


def test_after_a_publish_the_engine_is_the_trainer(engine: Engine, trainer: Any) -> None:
    with WeightPublisher(engine) as publisher:
        for step in range(3):
            train(trainer, step)
            report = publisher.publish(trainer, label=f"step-{step}")
            assert report.complete and report.label == f"step-{step}"
            assert engine.get_weight_version() == f"step-{step}"
            assert (
                engine.weights_fingerprint()
                == weight_sync.fingerprint(trainer)
                == report.fingerprint
            )
            check_parity(engine, trainer)


def test_a_publisher_connects_by_address(engine: Engine, trainer: Any) -> None:
    train(trainer, 7)
    with WeightPublisher(engine.address) as publisher:
        publisher.publish(trainer)
    assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)
    check_parity(engine, trainer)


def test_tensors_of_another_dtype_are_cast_and_reported(engine: Engine, trainer: Any) -> None:
    train(trainer, 8)
    half = [(name, tensor.detach().bfloat16()) for name, tensor in trainer.named_parameters()]
    report = engine.update_weights_from_tensor(half)
    assert {(source, target) for _, source, target in report.casts} == {("bfloat16", "float32")}
    trainer.load_state_dict(dict(half), strict=False)
    check_parity(engine, trainer)


def test_an_update_of_some_tensors_reports_what_was_left(engine: Engine, trainer: Any) -> None:
    engine.update_weights_from_tensor(trainer)
    with torch.no_grad():
        trainer.model.norm.weight.mul_(1.5)
    success, message = report = engine.update_weights_from_tensor(
        [("model.norm.weight", trainer.model.norm.weight)], weight_version=17
    )
    assert success and report.updated == 1 and "model.norm.weight" not in report.left
    assert len(report.left) == len(list(trainer.parameters())) - 1
    assert engine.get_weight_version() == "17" and "17" in message
    check_parity(engine, trainer)


def test_a_flattened_bucket_and_a_session_of_several_buckets(engine: Engine, trainer: Any) -> None:
    train(trainer, 9)
    tensors = list(trainer.named_parameters())
    before = engine.weights_fingerprint()
    engine.begin_weight_update(weight_version="all", strict=True)
    for first in range(0, len(tensors), 5):
        bucket = weight_sync.FlattenedTensorBucket(named_tensors=tensors[first : first + 5])
        engine.update_weights_from_tensor(
            {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()},
            load_format="flattened_bucket",
        )
        assert engine.weights_fingerprint() == before
    assert engine.end_weight_update().complete
    assert engine.get_weight_version() == "all"
    check_parity(engine, trainer)


@pytest.mark.parametrize("kind", ["list", "mapping", "iterator", "bucket", "module"])
def test_an_update_of_no_tensors_is_refused_and_is_no_version(engine: Engine, kind: str) -> None:
    bucket = weight_sync.FlattenedTensorBucket(named_tensors=[])
    kinds = {"list": [], "mapping": {}, "iterator": iter(()), "module": torch.nn.ReLU()}
    nothing: Any = {**kinds, "bucket": bucket}[kind]
    load_format = "flattened_bucket" if kind == "bucket" else None
    before = engine.version
    with pytest.raises(ManifestMismatch, match="got no tensors, expected at least one"):
        engine.update_weights_from_tensor(nothing, load_format=load_format)
    assert engine.version == before


def test_what_is_no_tensors_at_all_is_refused_in_words(engine: Engine) -> None:
    before = engine.version
    for nothing in (None, 7):
        with pytest.raises(ManifestMismatch, match="named_tensors: got"):
            engine.update_weights_from_tensor(nothing)
    for junk in ((5, []), (torch.zeros(4), 7), (torch.zeros(4).to_sparse(), [])):
        bucket = dict(zip(("flattened_tensor", "metadata"), junk, strict=True))
        with pytest.raises(ManifestMismatch, match=r"flattened_tensor.*expected"):
            engine.update_weights_from_tensor(bucket, load_format="flattened_bucket")
    half: Any = {"flattened_tensor": torch.zeros(4)}
    with pytest.raises(weight_sync.WeightUpdateError, match="flattened_tensor and metadata"):
        engine.update_weights_from_tensor(half, load_format="flattened_bucket")
    assert engine.version == before


def test_a_bucket_of_no_tensors_is_fine_in_a_session(engine: Engine, trainer: Any) -> None:
    named = iter(trainer.named_parameters())
    engine.begin_weight_update(strict=True)
    engine.update_weights_from_tensor([])
    engine.update_weights_from_tensor(named)
    engine.update_weights_from_tensor(named)
    assert engine.end_weight_update().complete
    check_parity(engine, trainer)


def test_an_aborted_or_incomplete_session_changes_nothing(engine: Engine, trainer: Any) -> None:
    engine.update_weights_from_tensor(trainer, weight_version="whole")
    before = engine.weights_fingerprint()
    part = list(trainer.named_parameters())[:3]
    engine.begin_weight_update()
    engine.update_weights_from_tensor([(name, tensor * 2) for name, tensor in part])
    engine.abort_weight_update()
    engine.begin_weight_update(strict=True)
    engine.update_weights_from_tensor([(name, tensor * 2) for name, tensor in part])
    with pytest.raises(ManifestMismatch, match=r"model\.norm\.weight"):
        engine.end_weight_update()
    with pytest.raises(SessionError):
        engine.end_weight_update()
    assert engine.weights_fingerprint() == before and engine.get_weight_version() == "whole"
    check_parity(engine, trainer)


def test_one_error_lists_every_problem_and_the_old_version_serves(
    engine: Engine, trainer: Any
) -> None:
    engine.update_weights_from_tensor(trainer)
    tensors = dict(trainer.named_parameters())
    tensors["model.layers.0.mlp.up_prj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.zeros(63)
    with WeightPublisher(engine) as publisher, pytest.raises(ManifestMismatch) as error:
        publisher.publish(tensors)
    for part in ("up_prj", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "63"):
        assert part in str(error.value)
    check_parity(engine, trainer)


def test_two_sessions_at_once_are_refused(engine: Engine, trainer: Any) -> None:
    engine.begin_weight_update()
    with WeightPublisher(engine.address) as other, pytest.raises(SessionBusy):
        other.publish(trainer)
    engine.abort_weight_update()
    with WeightPublisher(engine.address) as other:
        other.publish(trainer)


def test_weights_can_be_read_back_by_name(engine: Engine, trainer: Any) -> None:
    engine.update_weights_from_tensor(trainer)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        expected = trainer.get_parameter(name)[:5].tolist()
        assert engine.get_weights_by_name(name, truncate_size=5) == expected
    assert engine.get_weights_by_name("lm_head.weight", 2) == trainer.lm_head.weight[:2].tolist()
    with pytest.raises((ValueError, KeyError), match="no_such"):
        engine.get_weights_by_name("model.no_such.weight")


def test_an_update_from_disk_commits_or_changes_nothing(
    engine: Engine, trainer: Any, tmp_path: Path
) -> None:
    train(trainer, 10)
    trainer.save_pretrained(tmp_path / "good")
    engine.update_weights_from_disk(tmp_path / "good", weight_version="disk")
    check_parity(engine, trainer)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises((ValueError, weight_sync.WeightUpdateError)):
        engine.update_weights_from_disk(tmp_path / "bad")
    assert engine.model_path == str(tmp_path / "good") and engine.get_weight_version() == "disk"
    check_parity(engine, trainer)


def run_during(engine: Engine, action: Callable[[], Any], num_tokens: int = 300) -> dict[str, Any]:
    """Generate on another thread; call `action` when some tokens have come; return the finished result."""
    started, results = threading.Event(), []

    def run() -> None:
        params = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        for chunk in engine.generate(
            input_ids=PROMPTS[0], sampling_params=params, return_logprob=True, stream=True
        ):
            results.append(chunk)
            if len(chunk["output_ids"]) >= 5:
                started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    action()
    thread.join(60)
    assert not thread.is_alive()
    last: dict[str, Any] = results[-1]
    return last


def test_two_versions_under_one_label_stay_two_spans(engine: Engine, trainer: Any) -> None:
    engine.update_weights_from_tensor(trainer, weight_version="latest")
    train(trainer, 12)
    result = run_during(
        engine, lambda: engine.update_weights_from_tensor(trainer, weight_version="latest")
    )
    first, second = result["meta_info"]["weight_versions"]
    assert (first["version"], second["version"]) == ("latest", "latest")
    assert second["number"] == first["number"] + 1
    assert second["number"] == result["meta_info"]["weight_version_number"]
    assert (first["start"], first["end"], second["end"]) == (0, second["start"], 300)


@pytest.mark.parametrize("verify", ["pause", "overlapped"])
@pytest.mark.parametrize("policy", ["keep", "recompute", "flush"])
def test_a_running_request_goes_on_under_the_new_version(
    engine: Engine, trainer: Any, policy: Any, verify: Any
) -> None:
    engine.update_weights_from_tensor(trainer, weight_version="old")
    before = {name: p.detach().clone() for name, p in trainer.named_parameters()}
    train(trainer, 11)
    with WeightPublisher(engine) as publisher:
        result = run_during(
            engine, lambda: publisher.publish(trainer, label="new", kv_policy=policy, verify=verify)
        )
    spans = result["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["old", "new"]
    assert spans[1]["number"] == spans[0]["number"] + 1
    assert (spans[0]["start"], spans[1]["end"]) == (0, 300) and spans[0]["end"] == spans[1]["start"]
    new_logprobs = logprobs_of(trainer, PROMPTS[0], result)
    trainer.load_state_dict(before, strict=False)
    old_logprobs = logprobs_of(trainer, PROMPTS[0], result)
    got = [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
    cut = spans[0]["end"]
    assert got[:cut] == pytest.approx(old_logprobs[:cut], abs=1e-4)
    if policy == "keep":  # Older keys and values stay, so the numbers are of neither version alone.
        assert got[cut:] != pytest.approx(new_logprobs[cut:], abs=1e-4)
    else:
        assert got[cut:] == pytest.approx(new_logprobs[cut:], abs=1e-4)


def logprobs_of(model: Any, prompt: list[int], result: dict[str, Any]) -> list[float]:
    """Log-probability of each output token under `model`."""
    ids = prompt + result["output_ids"]
    with torch.no_grad():
        rows = torch.log_softmax(
            model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float(), -1
        )
    return rows.gather(1, torch.tensor(result["output_ids"])[:, None])[:, 0].tolist()


def test_a_prefix_of_an_older_version_is_never_found(engine: Engine, trainer: Any) -> None:
    prompt = list(range(30, 100))
    engine.update_weights_from_tensor(trainer, flush_cache=False)
    engine.generate(input_ids=prompt, sampling_params=GREEDY)
    warm = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    train(trainer, 12)
    engine.update_weights_from_tensor(trainer, flush_cache=False)
    cold = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    assert warm["meta_info"]["cached_tokens"] > 0 and cold["meta_info"]["cached_tokens"] == 0


def test_an_update_lands_while_generation_is_paused(engine: Engine, trainer: Any) -> None:
    train(trainer, 13)

    def update() -> None:
        engine.pause_generation("retract")
        engine.update_weights_from_tensor(trainer, weight_version="paused")
        engine.continue_generation()

    result = run_during(engine, update)
    assert result["meta_info"]["weight_versions"][-1]["version"] == "paused"
    assert len(result["output_ids"]) == 300


def test_parameters_keep_their_addresses(folder: Path, trainer: Any) -> None:
    with Engine(folder, kv_cache_bytes=1 << 20) as engine:
        model = engine._executor._core.runner.model  # type: ignore[attr-defined]
        before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        for step in range(2):
            train(trainer, step)
            engine.update_weights_from_tensor(trainer)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_overlapped_verification_that_fails_is_undone(folder: Path, trainer: Any) -> None:
    """With a kept copy, tokens of a version whose resident bytes are wrong were never sampled."""
    with Engine(folder, kv_cache_bytes=4 << 20, keep_previous_weights=True) as engine:
        expected = engine.generate(
            input_ids=PROMPTS[0],
            sampling_params={"temperature": 0.0, "max_new_tokens": 300, "ignore_eos": True},
        )
        core = engine._executor._core  # type: ignore[attr-defined]
        written = core.host.weights_written

        def corrupt(version: int, label: str | None, policy: str | None) -> None:
            written(version, label, policy)
            if version == 1:
                next(core.runner.model.parameters()).data[0, 0] += 1.0

        core.host.weights_written = corrupt
        train(trainer, 14)

        def publish() -> None:
            with WeightPublisher(engine) as publisher, pytest.raises(weight_sync.WeightUpdateError):
                publisher.publish(trainer, version=1, verify="overlapped", kv_policy="keep")

        result = run_during(engine, publish)
        assert result["output_ids"] == expected["output_ids"]
        assert [span["version"] for span in result["meta_info"]["weight_versions"]] == ["0"]
        assert engine.status().torn is None


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_aborted_under_a_version_that_is_undone_has_nothing_of_it(
    folder: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Neither tokens nor log-probabilities, be the request older than the version or not."""
    with Engine(folder, kv_cache_bytes=4 << 20, keep_previous_weights=True) as engine:
        params = {"temperature": 0.0, "max_new_tokens": 300, "ignore_eos": True}
        expected = engine.generate(input_ids=PROMPTS[0], sampling_params=params)["output_ids"]
        looking, go_on = threading.Event(), threading.Event()

        def wrong(*_: Any) -> None:
            looking.set()
            assert go_on.wait(30)
            raise weight_sync.FingerprintMismatch("a test says so")

        monkeypatch.setattr(WeightCommit, "_compare", wrong)
        train(trainer, 14)
        engine.slow_down(0.02)

        def publish() -> None:
            with WeightPublisher(engine) as publisher, pytest.raises(FingerprintMismatch):
                publisher.publish(trainer, version=1, verify="overlapped", kv_policy="keep")

        def drawn(core: Any) -> list[int]:
            return [request.num_output_tokens for request in core.scheduler.requests]

        def call() -> Any:
            found = engine.generate(
                input_ids=PROMPTS[0],
                sampling_params=params,
                return_logprob=True,
                logprob_start_len=0,
                stream=stream,
            )
            return list(found)[-1] if stream else found

        core = engine._executor._core  # type: ignore[attr-defined]
        with ThreadPoolExecutor(3) as threads:
            older = threads.submit(call)
            until(lambda: min(drawn(core), default=0) > 3)
            update = threads.submit(publish)
            assert looking.wait(30)
            before = drawn(core)[0]
            newer = threads.submit(call)
            until(lambda: len(drawn(core)) == 2 and min(drawn(core)) > 3)
            until(lambda: drawn(core)[0] > before + 3)
            assert engine.abort_request(abort_all=True) == 2
            go_on.set()
            update.result(30)
            results = [older.result(30), newer.result(30)]
        for result in results:
            meta = result["meta_info"]
            assert meta["finish_reason"]["type"] == "abort"
            assert {span["number"] for span in meta["weight_versions"]} == {0}
            assert len(meta["output_token_logprobs"]) == len(result["output_ids"])
        assert 3 < len(results[0]["output_ids"]) <= before
        assert results[0]["output_ids"] == expected[: len(results[0]["output_ids"])]
        assert results[1]["output_ids"] == []
        assert [v for v, _, _ in results[1]["meta_info"]["input_token_logprobs"]] == [None] * 3
        again = engine.generate(
            input_ids=PROMPTS[0], sampling_params={**params, "max_new_tokens": 5}
        )
        assert again["output_ids"] == expected[:5]


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)
