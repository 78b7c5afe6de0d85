"""Engines on the GPUs that Ray gives them: shared with a trainer by fraction, found whatever Ray shows, one a rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_cluster import ray_cluster

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"kv_cache_bytes": 4 << 20, "skip_tokenizer_init": True}
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


@pytest.fixture(scope="module", params=["Ray sets the visible GPUs", "Ray leaves them alone"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as environment:
        if request.param != "Ray sets the visible GPUs":
            environment.setenv(NOSET, "1")
        with ray_cluster(num_nodes=1, cpus_per_node=6, gpus_per_node=torch.cuda.device_count()):
            import ray

            yield ray


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)


class Trainer:
    """An actor with a part of a GPU, or a whole one."""

    def __init__(self) -> None:
        import ray

        self.gpu = int(ray.get_gpu_ids()[0])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.device = f"cuda:{0 if visible and NOSET not in os.environ else self.gpu}"

    def publish(self, address: str, folder: str) -> tuple[int, int]:
        """Moves the weights a little and pushes them; its GPU, and the fingerprint of what it has."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        with WeightPublisher(address) as publisher:
            publisher.publish(model)
        return self.gpu, weight_sync.fingerprint(model)


def gpu_of(engine: Engine) -> int:
    """The GPU of rank 0, by the machine's numbers."""
    places: Any = engine._executor._places  # type: ignore[attr-defined]
    return int(places[0].gpu_ids[0])


def test_a_trainer_and_an_engine_share_a_gpu_by_fraction(cluster: Any, folder: Path) -> None:
    trainer = cluster.remote(Trainer).options(num_gpus=0.5, num_cpus=1).remote()
    cluster.get(trainer.__ray_ready__.remote(), timeout=120)
    with Engine(folder, executor="ray", device="cuda", ray_num_gpus=0.5, **OPTIONS) as engine:
        with WeightPublisher(engine) as publisher:
            assert publisher.engine_info().device.startswith("cuda")
        gpu, fingerprint = cluster.get(
            trainer.publish.remote(engine.address, str(folder)), timeout=120
        )
        assert gpu_of(engine) == gpu
        assert engine.weights_fingerprint() == fingerprint
        assert len(engine.generate(input_ids=[5, 9], sampling_params=GREEDY)["output_ids"]) == 8
    cluster.kill(trainer)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_an_engine_takes_the_gpu_that_is_left(cluster: Any, folder: Path) -> None:
    trainer = cluster.remote(Trainer).options(num_gpus=1, num_cpus=1).remote()
    cluster.get(trainer.__ray_ready__.remote(), timeout=120)
    before = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    with Engine(folder, executor="ray", device="cuda", **OPTIONS) as engine:
        now = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        taken = [a - b for a, b in zip(before, now, strict=True)]
        assert taken.index(max(taken)) == gpu_of(engine), taken
        gpu, fingerprint = cluster.get(
            trainer.publish.remote(engine.address, str(folder)), timeout=120
        )
        assert gpu_of(engine) != gpu
        assert engine.weights_fingerprint() == fingerprint
    cluster.kill(trainer)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_each_rank_has_a_gpu_of_its_own(
    cluster: Any, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    with Engine(folder, executor="ray", device="cuda", tp_size=2, **OPTIONS) as engine:
        result = engine.generate(input_ids=[5, 9, 2], sampling_params=GREEDY)
        ids = torch.tensor([[5, 9, 2, *result["output_ids"]]])
        logits = reference_model(folder)(ids).logits[0, 2:-1]
        assert logits.argmax(-1).tolist() == result["output_ids"]
