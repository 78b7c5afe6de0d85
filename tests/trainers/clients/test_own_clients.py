"""Trainers' own client classes, as they come from the package index, against a server of this engine.

`make test-clients` runs this in an environment of its own.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import typing_extensions
from safetensors.torch import save_file
from versions import TOLERANCE, Reference, version_weights

from rollout.server import ServerProcess, launch_server_process

sys.path.append(  # behind the packages, whose names scripts there have
    str(Path(__file__).parents[3] / "examples" / "http_trainers")
)

PROMPT = [5, 9, 2, 40]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture
def server(folder: Path) -> Iterator[ServerProcess]:
    options: dict[str, Any] = {"kv_cache_bytes": 4 << 20, "num_threads": 1}
    with launch_server_process(folder, server={"port": 0, "drain_s": 1.0}, **options) as found:
        yield found


def check(reference: Reference, number: int, tokens: list[int], logprobs: list[float]) -> None:
    expected = reference.at(number).logprobs(PROMPT, tokens)
    assert len(tokens) == len(logprobs) > 0
    gap = torch.tensor(logprobs) - torch.tensor(expected)
    assert float(gap.abs().max()) < TOLERANCE


def test_areal_generates_and_updates(
    server: ServerProcess, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    from areal.api import ModelAllocation, ModelRequest, ParamSpec, WeightUpdateMeta
    from areal.api.cli_args import (
        GenerationHyperparameters,
        InferenceEngineConfig,
        NameResolveConfig,
    )
    from areal.engine.sglang_remote import RemoteSGLangEngine
    from areal.utils import name_resolve, names
    from trainer_side import Group

    names_at = str(tmp_path / "names")
    name_resolve.reconfigure(NameResolveConfig(type="nfs", nfs_record_root=names_at))
    config = InferenceEngineConfig(
        backend="sglang:d1",
        experiment_name="e",
        trial_name="t",
        request_timeout=60,
        setup_timeout=20,
        pause_grace_period=0.1,
    )
    engine = RemoteSGLangEngine(config)
    address = server.url.removeprefix("http://")
    engine.initialize(engine_id="0", addr=address, train_data_parallel_size=1)

    def ask(num: int) -> ModelRequest:
        params = GenerationHyperparameters(max_new_tokens=num, max_tokens=500, ignore_eos=True)
        return ModelRequest(input_ids=list(PROMPT), gconfig=params)

    def from_disk(version: int) -> None:
        path = tmp_path / f"v{version}"
        path.mkdir()
        save_file(version_weights(folder, version), path / "model.safetensors")
        saved = names.update_weights_from_disk("e", "t", engine.get_version())
        name_resolve.add(saved, str(time.time()), keepalive_ttl=120)
        meta = WeightUpdateMeta(type="disk", path=str(path), version=version)
        engine.update_weights_from_disk(meta).result(timeout=60)
        engine.set_version(version)

    async def generate() -> None:
        await asyncio.to_thread(from_disk, 1)
        first = await engine.agenerate(ask(8))
        check(reference, 1, first.output_tokens, first.output_logprobs)
        httpx.post(f"{server.url}/slow_down", json={"forward_sleep_time": 0.1})
        running = asyncio.create_task(engine.agenerate(ask(300)))
        while httpx.get(f"{server.url}/get_load").json()[0]["num_tokens"] < 32:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.pause_generation)
        await asyncio.to_thread(from_disk, 2)
        httpx.post(f"{server.url}/slow_down", json={"forward_sleep_time": 0})
        await asyncio.to_thread(engine.continue_generation)
        whole = await running
        assert whole.stop_reason == "length" and len(whole.output_tokens) == 300
        old = whole.output_versions.count(1)
        assert 0 < old < 300 and set(whole.output_versions) == {1, 2}
        check(reference, 1, whole.output_tokens[:old], whole.output_logprobs[:old])

    asyncio.run(generate())
    engine.offload()
    engine.onload(["weights"])
    engine.onload(["kv_cache"])

    group = Group("update_weight_group", 2)
    meta = WeightUpdateMeta(
        type="xccl",
        gen_allocation=ModelAllocation.from_str("sglang:d1", name="rollout"),
        nccl_master_address="127.0.0.1",
        nccl_master_port=group.port,
        nccl_group_name=group.name,
    )
    joined = engine.init_weights_update_group(meta)
    group.meet()
    joined.result(timeout=60)
    tensors = version_weights(folder, 3)
    specs = [
        ParamSpec(name=name, shape=tuple(tensor.shape), dtype="float32")
        for name, tensor in tensors.items()
    ]
    engine.pause_generation()
    taken = engine.update_weights_from_distributed(meta, specs)
    group.broadcast(tensors)
    taken.result(timeout=60)
    engine.continue_generation()
    engine.set_version(3)
    last = asyncio.run(engine.agenerate(ask(8)))
    check(reference, 3, last.output_tokens, last.output_logprobs)
    engine.destroy()


def test_skyrl_asks_and_controls(
    server: ServerProcess, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On Python 3.11 pydantic wants another TypedDict than typing's; SkyRL asks for 3.12.
    monkeypatch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
    from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import (
        RemoteInferenceClient,
    )

    async def run() -> None:
        client = RemoteInferenceClient(
            proxy_url=server.url, server_urls=[server.url], data_parallel_size=1
        )
        assert await client.get_world_size() == (1, 1)
        params = {"max_tokens": 8, "temperature": 1.0, "logprobs": 1, "top_k": -1, "min_p": 0.0}
        batch = {
            "prompt_token_ids": [PROMPT, PROMPT],
            "sampling_params": params,
            "session_ids": ["a", "b"],
            "cache_salt": "policy:0",
        }
        found = await client.generate(batch)
        for tokens, values in zip(found["response_ids"], found["response_logprobs"], strict=True):
            check(reference, 0, tokens, values)
        chunks = [{"type": "encoded_text", "tokens": PROMPT}]
        asked = {"prompt": {"chunks": chunks}, "num_samples": 3, "prompt_logprobs": True}
        asked["sampling_params"] = {"max_tokens": 4, "temperature": 1.0}
        sampled = await client.sample({"json": asked})
        assert [len(sequence["tokens"]) for sequence in sampled["sequences"]] == [4, 4, 4]
        expected = reference.at(0).logprobs(PROMPT[:1], PROMPT[1:])
        got = torch.tensor(sampled["prompt_logprobs"][1:])
        assert torch.allclose(got, torch.tensor(expected), atol=TOLERANCE)

        running = asyncio.create_task(
            client.generate({**batch, "sampling_params": {**params, "max_tokens": 100}})
        )
        await client.pause_generation()
        await client.reset_prefix_cache(reset_running_requests=True)
        await client.resume_generation()
        assert all(reason in ("stop", "length") for reason in (await running)["stop_reasons"])
        await client.sleep(1)
        assert await client.is_sleeping()
        await client.wake_up(["weights"])
        await client.wake_up(["kv_cache"])
        check(reference, 0, *_only(await client.generate({**batch, "cache_salt": "policy:1"})))
        await client.teardown()

    asyncio.run(run())


def _only(found: Any) -> tuple[list[int], list[float]]:
    return found["response_ids"][0], found["response_logprobs"][0]


def test_renderers_gets_the_evidence_that_it_wants(
    server: ServerProcess, folder: Path, reference: Reference
) -> None:
    import openai
    from renderers.client import OverlongPromptError, generate

    def parsed(ids: list[int], **_: Any) -> Any:
        return SimpleNamespace(
            content="", reasoning_content=None, reasoning_complete=None, tool_calls=[]
        )

    renderer: Any = SimpleNamespace(
        supports_tools=True, get_stop_token_ids=lambda: [258], parse_response=parsed
    )

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY") as client:
            asked: dict[str, Any] = {
                "client": client,
                "renderer": renderer,
                "messages": [],
                "model": str(folder),
                "sampling_params": {
                    "max_tokens": 8,
                    "temperature": 1.0,
                    "routed_experts_prompt_start": 2,
                },
            }
            found = await generate(
                prompt_ids=PROMPT, cache_salt="a", extra_headers={"X-Session-ID": "s"}, **asked
            )
            check(reference, 0, found["completion_ids"], found["completion_logprobs"])
            assert found["finish_reason"] in ("stop", "length")
            with pytest.raises(OverlongPromptError):
                await generate(prompt_ids=list(range(200)) * 3, **asked)

    asyncio.run(run())


@pytest.fixture
def router() -> Iterator[str]:
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    words = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    words += ["--port", ports[0], "--prometheus-port", ports[1]]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/workers").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < end, "no router"
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def test_slimes_requests_go_through_the_router_that_it_starts(
    server: ServerProcess, router: str, reference: Reference
) -> None:
    from slime import Slime

    trainer = Slime(server.url, router=router)
    trainer.discover()
    trainer.register()
    sample = trainer.generate(PROMPT, 12)
    check(reference, 0, sample["tokens"], sample["logprobs"])
    found: list[dict[str, Any]] = []
    httpx.post(f"{server.url}/slow_down", json={"forward_sleep_time": 0.1})
    thread = threading.Thread(
        target=lambda: found.append(trainer.generate(PROMPT, 400, ignore_eos=True))
    )
    thread.start()
    while httpx.get(f"{server.url}/get_load").json()[0]["num_tokens"] < 32:
        assert thread.is_alive()
    trainer.abort_until_idle()
    httpx.post(f"{server.url}/slow_down", json={"forward_sleep_time": 0})
    thread.join(60)
    assert found[0]["finish"] == "abort" and 0 < len(found[0]["tokens"]) < 400
    check(reference, 0, found[0]["tokens"], found[0]["logprobs"])
