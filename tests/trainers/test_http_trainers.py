"""Trainers that ask over HTTP, each with its own requests in its own order: examples/http_trainers against a server.

The server is a process of its own. Its weights are noise, and refused, before each trainer's first update.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from versions import TOLERANCE, Reference, version_weights

from rollout import Engine
from rollout.server import ServerProcess, launch_server_process

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / "http_trainers"), str(ROOT / "tests" / "sync")]

ENGINE: dict[str, Any] = {"kv_cache_bytes": 4 << 20, "num_threads": 1}
PROMPT = [5, 9, 2, 40]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with launch_server_process(folder, server={"port": 0, "drain_s": 1.0}, **ENGINE) as found:
        yield found


@pytest.fixture
def url(server: ServerProcess) -> str:
    """Of a server with noise for weights, which it does not serve."""
    poison(server.url)
    return server.url


def poison(url: str) -> None:
    body = {"action": "reset_tensors"}
    httpx.post(f"{url}/weights_checker", json=body, timeout=60.0).raise_for_status()
    ask = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    assert httpx.post(f"{url}/generate", json=ask, timeout=60.0).status_code == 503


def checkpoint(folder: Path, number: int, at: Path) -> Path:
    """A folder with the weights of that version, as trainers write it: no configuration beside them."""
    at.mkdir()
    save_file(version_weights(folder, number), at / "model.safetensors")
    return at


def check(reference: Reference, number: int, sample: dict[str, Any], **options: Any) -> None:
    """The tokens' log-probabilities are those of that version."""
    expected = reference.at(number).logprobs(PROMPT, sample["tokens"], **options)
    assert len(sample["logprobs"]) == len(sample["tokens"]) > 0
    gap = (torch.tensor(sample["logprobs"]) - torch.tensor(expected)).abs().max()
    assert float(gap) < TOLERANCE


@contextmanager
def under_way(
    url: str, generate: Callable[..., dict[str, Any]], *given: Any, **named: Any
) -> Iterator[list[dict[str, Any]]]:
    """A sample of hundreds of tokens, of which some are drawn, and which ends after the block: it is in the list then.

    Steps take so long within the block that the sample cannot end there by itself.
    """
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(generate(*given, **named)), daemon=True)
    with httpx.Client(base_url=url, timeout=60.0) as http:
        http.post("/slow_down", json={"forward_sleep_time": 0.1}).raise_for_status()
        try:
            thread.start()
            while http.get("/get_load").json()[0]["num_tokens"] < 32:  # tokens of what runs
                assert thread.is_alive()
            yield found
        finally:
            http.post("/slow_down", json={"forward_sleep_time": 0}).raise_for_status()
        thread.join(120)
    assert found, "the sample did not end"


def test_slime_updates_over_a_group(url: str, folder: Path, reference: Reference) -> None:
    from slime import Slime

    trainer = Slime(url)
    assert trainer.discover() == {"num_gpus": 1, "worker_type": "regular"}
    trainer.connect()
    for number in (1, 2):
        trainer.update_from_distributed(version_weights(folder, number))
        assert trainer.weight_version() == str(number)
        trainer.register()
        sample = trainer.generate(PROMPT, 12)
        assert sample["weight_version"] == str(number)
        check(reference, number, sample)
    trainer.disconnect()


def test_slime_compares_weights_that_were_reset_and_sent_again(url: str, folder: Path) -> None:
    from slime import Slime

    trainer = Slime(url)
    trainer.connect()
    trainer.update_from_distributed(version_weights(folder, 3))
    trainer.check_weights("snapshot")
    trainer.check_weights("reset_tensors")
    with pytest.raises(RuntimeError, match="weights_checker"):
        trainer.check_weights("compare")
    trainer.update_from_distributed(version_weights(folder, 3))
    trainer.check_weights("compare")
    trainer.disconnect()


def test_slime_loads_a_folder_and_shares_memory(
    url: str, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    from foreign_sender import Sender, model_of
    from slime import Slime

    trainer = Slime(url)
    trainer.update_from_disk(str(checkpoint(folder, 4, tmp_path / "weight_v000001")))
    check(reference, 4, trainer.generate(PROMPT, 12))
    sender = Sender()
    try:
        payload = sender.payloads("model bucket", folder, 5)
        trainer.update_from_tensor([payload], "flattened_bucket")
        sample = trainer.generate(PROMPT, 12)
    finally:
        sender.close()
    assert sample["weight_version"] == "2"
    with torch.no_grad():
        logits = model_of(folder, 5).float()(torch.tensor([PROMPT + sample["tokens"]])).logits[0]
    rows = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1]
    expected = rows.gather(1, torch.tensor(sample["tokens"])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(sample["logprobs"]), expected, atol=TOLERANCE)


def test_slime_gets_partial_samples_and_goes_on_with_them(
    url: str, folder: Path, reference: Reference
) -> None:
    from slime import Slime

    trainer = Slime(url)
    trainer.connect()
    trainer.update_from_distributed(version_weights(folder, 1))
    with under_way(url, trainer.generate, PROMPT, 400, ignore_eos=True) as found:
        trainer.abort_until_idle()
    (part,) = found
    assert part["finish"] == "abort" and 0 < len(part["tokens"]) < 400
    check(reference, 1, part)
    rest = trainer.generate(PROMPT + part["tokens"], 5, ignore_eos=True)
    whole = {name: part[name] + rest[name] for name in ("tokens", "logprobs")}
    check(reference, 1, whole)
    trainer.disconnect()


def test_slime_freezes_what_runs_while_the_weights_change(
    url: str, folder: Path, reference: Reference
) -> None:
    from slime import Slime

    trainer = Slime(url)
    trainer.connect()
    trainer.update_from_distributed(version_weights(folder, 1))
    with under_way(url, trainer.generate, PROMPT, 400, ignore_eos=True) as found:
        trainer.update_from_distributed(version_weights(folder, 2), mode="in_place")
    (sample,) = found
    assert sample["finish"] == "length" and len(sample["tokens"]) == 400
    assert sample["weight_version"] == "2"
    first = {name: sample[name][:1] for name in ("tokens", "logprobs")}
    check(reference, 1, first)
    check(reference, 2, trainer.generate(PROMPT, 12))
    trainer.disconnect()


def test_areal_resubmits_what_an_update_has_aborted(
    url: str, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    from areal import Areal

    trainer = Areal(url)
    trainer.wait_until_ready()
    trainer.update_from_disk(str(checkpoint(folder, 1, tmp_path / "weight_update_v1")))
    trainer.connect()
    with under_way(url, trainer.generate, PROMPT, 300, ignore_eos=True) as found:
        trainer.update_from_distributed(version_weights(folder, 2))
    (sample,) = found
    assert sample["finish"] == "length" and len(sample["tokens"]) == 300
    old = sample["versions"].count(1)
    assert sample["versions"] == [1] * old + [2] * (300 - old) and 0 < old < 300
    for number, part in ((1, slice(0, old)), (2, slice(old, None))):
        expected = reference.at(number).logprobs(PROMPT, sample["tokens"])[part]
        gap = torch.tensor(sample["logprobs"][part]) - torch.tensor(expected)
        assert float(gap.abs().max()) < TOLERANCE


def test_areal_scores_and_gives_memory_back(
    url: str, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    from areal import Areal

    trainer = Areal(url)
    new = str(checkpoint(folder, 3, tmp_path / "weight_update_v1"))
    trainer.update_from_disk(new)
    scores = trainer.score([*PROMPT, 7, 8, 11], 3)
    expected = reference.at(3).logprobs(PROMPT, [7, 8, 11])
    assert torch.allclose(torch.tensor(scores), torch.tensor(expected), atol=TOLERANCE)
    trainer.offload()
    trainer.onload(["weights"])
    trainer.onload(["kv_cache"])
    trainer.update_from_disk(new)
    check(reference, 3, trainer.generate(PROMPT, 12))


def test_prime_rl_has_a_folder_loaded_while_requests_are_frozen(
    url: str, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    from prime_rl import PrimeRL

    trainer = PrimeRL(url)
    assert trainer.wait_until_ready(str(folder)) == 512
    trainer.update_weights(checkpoint(folder, 1, tmp_path / "step_1"))
    label = httpx.get(f"{url}/get_weight_version", timeout=60.0).json()["weight_version"]
    assert label == "step_1"
    long = {"max_tokens": 400, "ignore_eos": True}
    with under_way(url, trainer.generate, PROMPT, "one", **long) as found:
        trainer.update_weights(checkpoint(folder, 2, tmp_path / "step_2"))
    (sample,) = found
    assert sample["finish"] == "length" and len(sample["tokens"]) == 400
    check(reference, 1, {name: sample[name][:1] for name in ("tokens", "logprobs")})
    check(reference, 2, trainer.generate(PROMPT, "two", max_tokens=12))
    check(reference, 2, trainer.chat_with_tokens(PROMPT, max_tokens=12, temperature=1.0))
    assert trainer.wait_until_ready(str(folder)) == 512  # its name is that of the start


def test_prime_rl_goes_on_with_the_old_weights_after_a_folder_that_is_refused(
    url: str, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    from prime_rl import PrimeRL

    trainer = PrimeRL(url)
    trainer.wait_until_ready(str(folder))
    trainer.update_weights(checkpoint(folder, 1, tmp_path / "step_1"))
    (tmp_path / "step_2").mkdir()
    with pytest.raises(RuntimeError, match="update_weights"):
        trainer.update_weights(tmp_path / "step_2")
    check(reference, 1, trainer.generate(PROMPT, "one", max_tokens=12))
    refused = httpx.post(f"{url}/init_broadcaster", json={"host": "a", "port": 1}, timeout=60.0)
    assert refused.status_code == 501 and "WeightPublisher" in refused.json()["message"]


def test_skyrl_freezes_publishes_and_thaws(folder: Path, reference: Reference) -> None:
    from skyrl import SkyRL

    with (
        Engine(folder, executor="local", **ENGINE) as engine,
        launch_server_process(address=engine.address, server={"port": 0}) as server,
    ):
        poison(server.url)
        trainer = SkyRL(server.url, [engine.address])
        assert trainer.world_size() == 1
        trainer.sync_weights(version_weights(folder, 1))
        assert engine.weight_version == "1"
        long = {"max_tokens": 400, "ignore_eos": True}
        with under_way(server.url, trainer.generate, PROMPT, "one", **long) as samples:
            trainer.sync_weights(version_weights(folder, 2))
            trainer.reset_prefix_cache(running=True)
        (sample,) = samples
        assert sample["finish"] == "length" and len(sample["tokens"]) == 400
        check(reference, 1, {name: sample[name][:1] for name in ("tokens", "logprobs")})
        check(reference, 2, trainer.generate(PROMPT, "two", max_tokens=12))
        found = trainer.sample(PROMPT, 3, 4)
        assert [len(tokens) for tokens in found["samples"]] == [4, 4, 4]
        prompt = reference.at(2).logprobs(PROMPT[:1], PROMPT[1:])
        assert found["prompt_logprobs"][0] is None
        assert torch.allclose(
            torch.tensor(found["prompt_logprobs"][1:]), torch.tensor(prompt), atol=1e-4
        )
        assert trainer.sleep(2)
        trainer.wake_up("weights")
        trainer.sync_weights(version_weights(folder, 3))
        trainer.wake_up("kv_cache")
        check(reference, 3, trainer.generate(PROMPT, "three", max_tokens=12))
        trainer.close()
