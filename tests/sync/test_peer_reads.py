"""A trainer on one GPU, engine ranks on others of the machine: they read its arena over the link between them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_sender import model_of
from sync_support import collect, eventually, kill, read_line, spawn, weights

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
PROMPT = [5, 9, 2, 77]


def state_of(process: Any) -> dict[str, Any]:
    process.stdin.write("state\n")
    process.stdin.flush()
    found: dict[str, Any] = json.loads(read_line(process))
    return found


@pytest.fixture(scope="module", params=["numbered alike", "each sees its own GPU alone"])
def far(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    """A toy engine on the second GPU, and its address."""
    with pytest.MonkeyPatch.context() as patch:
        device = "cuda:1"
        if request.param != "numbered alike":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            patch.setenv("CUDA_VISIBLE_DEVICES", visible[1])
            device = "cuda:0"
        process = spawn("engine_process.py", "-", device)
    yield process, read_line(process)
    collect(process)


@pytest.mark.parametrize("arena_bytes", [None, 2048])
def test_an_engine_on_another_gpu_reads_what_the_trainer_packed(
    far: tuple[Any, str], arena_bytes: int | None
) -> None:
    process, address = far
    with (
        torch.cuda.device(0),
        WeightPublisher(address, transport="cuda_ipc", arena_bytes=arena_bytes) as publisher,
    ):
        for value in (1.0, 2.0, 3.0):
            report = publisher.publish(weights(value, device="cuda:0"))
            assert report.fingerprint == weight_sync.fingerprint(weights(value))
            state = state_of(process)
            assert state["values"] == [value] and state["mixtures"] == [] and not state["moved"]
    assert eventually(lambda: state_of(process)["still_open"] == 0)
    torch.cuda.synchronize(0)


@pytest.mark.parametrize("phase", ["begin", "stage", "vote", "commit"])
def test_a_trainer_killed_on_its_own_gpu_leaves_the_engine_whole(
    far: tuple[Any, str], child: Callable[..., Any], phase: str
) -> None:
    process, address = far
    doomed = child("trainer_process.py", address, phase, "cuda_ipc", "cuda:0")
    assert read_line(doomed) == "ready"
    kill(doomed)
    assert eventually(lambda: state_of(process)["still_open"] == 0)
    with torch.cuda.device(0), WeightPublisher(address, transport="cuda_ipc") as publisher:
        publisher.publish(weights(5.0, device="cuda:0"))
    assert state_of(process)["values"] == [5.0] and state_of(process)["mixtures"] == []


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=["one rank", "two ranks"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    one = request.param == "one rank"
    with Engine(
        folder,
        executor="local",
        device="cuda:1" if one else "cuda",
        tp_size=1 if one else 2,
        kv_cache_bytes=4 << 20,
        request_timeout_s=60,
    ) as engine:
        yield engine


@pytest.mark.parametrize("gpu", [0, 1])
@pytest.mark.parametrize("how", ["publisher", "two buckets", "torch call"])
def test_all_ranks_come_to_the_trainers_version(
    engine: Engine, folder: Path, gpu: int, how: str
) -> None:
    with torch.cuda.device(gpu):
        for seed in (1, 2):
            model = model_of(folder, 10 * seed + gpu).to(f"cuda:{gpu}")
            if how == "torch call":
                report = engine.update_weights_from_tensor(list(model.named_parameters()))
            else:
                arena_bytes = 1 << 20 if how == "two buckets" else None
                with WeightPublisher(
                    engine, transport="cuda_ipc", arena_bytes=arena_bytes
                ) as publisher:
                    publisher.publish(model)
                    packed = publisher._endpoint._packed
                    assert packed is not None
                    assert (packed.window is not None) == (how == "two buckets")
                    report = publisher.publish(model, verify="overlapped")
            assert report.transport == "cuda_ipc" and report.complete
            assert engine.weights_fingerprint() == weight_sync.fingerprint(model)
            output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
            ids = torch.tensor([PROMPT + output], device=f"cuda:{gpu}")
            with torch.no_grad():
                rows = model(ids).logits[0, len(PROMPT) - 1 : -1]
            assert rows.argmax(-1).tolist() == output
