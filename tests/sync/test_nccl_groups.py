"""Weights over NCCL, from a trainer's GPU to GPUs of an engine: the publisher's way, and the way of a plain trainer.

NCCL takes no two members on one GPU, so this needs one more than the engine has ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_group_support import free_port
from stopped import stop
from sync_support import collect, kill, read_line, spawn, weights
from torch.distributed import distributed_c10d as c10d

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher
from weight_sync.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    SessionBusy,
    SyncError,
    TransportError,
)

pytestmark = pytest.mark.gpu

NAME = "updates"
PROMPTLY_S = 10.0
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


def needs_gpus(num: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < num, reason=f"needs {num} GPUs")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=False)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="one rank", marks=needs_gpus(2)),
        pytest.param(2, id="two ranks", marks=needs_gpus(3)),
    ],
)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """Its ranks are on the first GPUs."""
    with Engine(
        folder,
        executor="local",
        tp_size=request.param,
        device="cuda",
        kv_cache_bytes=1 << 20,
        request_timeout_s=30.0,
    ) as engine:
        yield engine


@pytest.fixture
def gpu(engine: Engine) -> Iterator[torch.device]:
    """The trainer's GPU, which is the current one."""
    with torch.cuda.device(engine.config.tp_size):
        yield torch.device("cuda", engine.config.tp_size)


@pytest.fixture
def trainer(folder: Path, gpu: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(gpu)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def check_served(engine: Engine, model: Any) -> None:
    """The engine has the model's bytes and says what the model says."""
    assert engine.weights_fingerprint() == weight_sync.fingerprint(model)
    prompt = [5, 9, 2, 77]
    output = engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
    ids = torch.tensor([prompt + output], device=model.device)
    with torch.no_grad():
        assert model(ids).logits[0, 3:-1].argmax(-1).tolist() == output


def test_a_publisher_pushes_over_a_group_of_its_own(engine: Engine, trainer: Any) -> None:
    with WeightPublisher(engine, transport="process_group", bucket_bytes=100_000) as publisher:
        for _ in range(3):
            with torch.no_grad():
                trainer.model.norm.weight.mul_(1.01)
            report = publisher.publish(trainer)
            assert report.transport == "process_group" and report.complete
            check_served(engine, trainer)
        part = publisher.publish({"model.norm.weight": trainer.model.norm.weight * 2}, strict=False)
        assert part.updated == 1
    with WeightPublisher(engine, transport="process_group", group_backend="gloo") as publisher:
        publisher.publish(trainer)
        check_served(engine, trainer)


def make_group(how: str, port: int, world_size: int, device: torch.device) -> Any:
    """A plain trainer's group, rank 0; connects with its first broadcast."""
    timeout = timedelta(seconds=30)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=True, wait_for_workers=False)
    if how == "constructor":
        options = dist.ProcessGroupNCCL.Options()
        return store, dist.ProcessGroupNCCL(dist.PrefixStore(NAME, store), 0, world_size, options)
    helper: Any = c10d._new_process_group_helper
    group, _ = helper(
        world_size,
        0,
        [],
        c10d.Backend("nccl"),
        c10d.PrefixStore(NAME, store),
        group_name=NAME,
        timeout=timeout,
        device_id=None,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return store, group


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
@pytest.mark.parametrize("how", ["constructor", "helper"])
def test_a_plain_trainer_broadcasts_what_it_has_announced(
    engine: Engine, trainer: Any, gpu: torch.device, how: str, load_format: Any
) -> None:
    world, port = 1 + engine.config.tp_size, free_port()
    with ThreadPoolExecutor(1) as background:
        joining = background.submit(
            engine.init_weights_update_group, "127.0.0.1", port, 1, world, NAME, "nccl"
        )
        store, group = make_group(how, port, world, gpu)
        joining.result(30)
        named = [(name, p.detach()) for name, p in trainer.named_parameters()]
        for part in (named[:7], named[7:]):
            staged = background.submit(
                engine.update_weights_from_distributed,
                [name for name, _ in part],
                [tensor.dtype for _, tensor in part],
                [tensor.shape for _, tensor in part],
                NAME,
                load_format=load_format,
            )
            sent = [tensor for _, tensor in part]
            if load_format is not None:
                bucket = weight_sync.FlattenedTensorBucket(named_tensors=part)
                sent = [bucket.get_flattened_tensor()]
            for tensor in sent:
                if how == "constructor":
                    group.broadcast(tensor, 0).wait()
                else:
                    dist.broadcast(tensor, 0, group=group)
            staged.result(30)
        check_served(engine, trainer)
        engine.destroy_weights_update_group(NAME)
        if how == "constructor":
            group.abort()
        else:
            dist.destroy_process_group(group)
        del store


def test_a_trainer_that_never_broadcasts_is_given_up_by_the_deadline(
    engine: Engine, trainer: Any, gpu: torch.device
) -> None:
    with WeightPublisher(engine, transport="process_group", timeout_s=8.0) as publisher:
        before = publisher.publish(trainer).fingerprint
        group = publisher._endpoint._packed.arena._group  # type: ignore[union-attr]
        sending = group.broadcast
        group.broadcast = lambda *args, **options: Future()  # it is on its way for ever
        with pytest.raises((DeadlineExceeded, TransportError)), torch.no_grad():
            trainer.model.norm.weight.mul_(1.01)
            publisher.publish(trainer)
        group.broadcast = sending
        assert engine.status().torn is None and engine.weights_fingerprint() == before
        publisher.publish(trainer)
        check_served(engine, trainer)


def state_of(process: Any) -> dict[str, Any]:
    process.stdin.write("state\n")
    process.stdin.flush()
    found: dict[str, Any] = json.loads(read_line(process))
    return found


def other_gpu_works(number: int) -> bool:
    torch.cuda.synchronize(number)
    return int(torch.ones(10, device=f"cuda:{number}").sum()) == 10


@pytest.fixture(scope="module")
def far() -> Iterator[tuple[Any, str]]:
    """A toy engine on the first GPU, which outlives its trainers, and its address."""
    process = spawn("engine_process.py", "-", "cuda:0")
    yield process, read_line(process)
    collect(process)


@needs_gpus(2)
@pytest.mark.timeout(
    60
)  # processes start in seconds; what hangs must not take the time of the others
@pytest.mark.parametrize("phase", ["begin", "waiting in a kernel", "vote", "commit"])
def test_a_trainer_that_is_killed_frees_the_engine_within_seconds(
    far: tuple[Any, str], child: Callable[..., Any], phase: str
) -> None:
    """In the second one the engine's kernel waits for bytes that were announced and will never come."""
    process, address = far
    doomed = child("group_trainer_process.py", address, phase, "cuda:1")
    assert read_line(doomed) == "ready"
    if phase == "waiting in a kernel":
        time.sleep(1.0)  # for the kernel to be there; nothing tells from outside
    kill(doomed)
    start = time.monotonic()
    with torch.cuda.device(1):
        options: dict[str, Any] = {"transport": "process_group", "timeout_s": 60}
        with WeightPublisher(address, **options) as publisher:
            while True:
                try:
                    publisher.publish(weights(5.0, device="cuda:1"))
                    break
                except SessionBusy:  # the dead trainer's, for as long as it has not been noticed
                    assert time.monotonic() - start < PROMPTLY_S
                    time.sleep(0.05)
            took = time.monotonic() - start
            state = state_of(process)
    print(f"\ntrainer killed, {phase}: the next one's update took {took:.2f} s, {state['threads']}")
    assert took < PROMPTLY_S
    assert state["values"] == [5.0] and state["mixtures"] == [] and not state["moved"]
    assert other_gpu_works(1)


@needs_gpus(2)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("phase", ["before the bytes", "waiting in a kernel"])
def test_an_engine_that_is_killed_frees_the_trainer_within_seconds(
    child: Callable[..., Any], phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = child("engine_process.py", "-", "cuda:0")
    with torch.cuda.device(1), ThreadPoolExecutor(1) as background:
        publisher = WeightPublisher(read_line(process), transport="process_group", timeout_s=60)
        publisher.publish(weights(1.0, device="cuda:1"))
        new = weights(2.0, device="cuda:1")
        publisher.begin()
        if phase == "waiting in a kernel":
            stop(process.pid)  # it hears of the bucket no more, and takes nothing
            sending = background.submit(publisher.send, new)
            time.sleep(1.0)
            assert not sending.done()
            start = kill(process) or time.monotonic()
        else:
            start = kill(process) or time.monotonic()
            sending = background.submit(publisher.send, new)
        error = sending.exception(PROMPTLY_S)
        noticed = time.monotonic() - start
        publisher.close()
        closed = time.monotonic() - start
        print(
            f"\nengine killed, {phase}: noticed in {noticed:.2f} s, closed in {closed:.2f} s, {error!r}"
        )
        assert isinstance(error, SyncError) and closed < PROMPTLY_S
        assert other_gpu_works(1)
        print(f"the GPU was free after {time.monotonic() - start:.2f} s")
        another = child("engine_process.py", "-", "cuda:0")
        options: dict[str, Any] = {"transport": "process_group", "timeout_s": 60}
        with WeightPublisher(read_line(another), **options) as publisher:
            publisher.publish(new)
            assert state_of(another)["values"] == [2.0]


def test_two_members_on_one_gpu_are_told_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    model = {"model.norm.weight": torch.ones(64, device="cuda:0")}
    with (
        Engine(folder, device="cuda:0", kv_cache_bytes=1 << 20) as engine,
        torch.cuda.device(0),
        WeightPublisher(engine, transport="process_group", timeout_s=20) as publisher,
        pytest.raises(SyncError, match="group_backend='gloo'"),
    ):
        publisher.publish(model, strict=False)


LENGTHS = {
    "half": 0.5,
    "less by a few": -16,
    "more by a few": 16,
    "twice": 2,
    "64 MiB more": 64 << 20,
}


@pytest.fixture(scope="module")
def impatient(folder: Path) -> Iterator[Engine]:
    options: dict[str, Any] = {"executor": "local", "device": "cuda", "kv_cache_bytes": 1 << 20}
    with Engine(folder, request_timeout_s=8.0, **options) as engine:
        yield engine


@needs_gpus(2)
@pytest.mark.parametrize("length", LENGTHS)
def test_what_nccl_makes_of_another_length_is_refused_by_the_fingerprint_or_the_deadline(
    impatient: Engine, length: str
) -> None:
    """Its own ends tell nothing: it waits for ever, or gives the beginning of what was sent, or anything."""
    name, shape, gpu = "lm_head.weight", [288, 64], torch.device("cuda", 1)
    before, change = impatient.weights_fingerprint(), LENGTHS[length]
    refusals = (FingerprintMismatch, DeadlineExceeded, TransportError)
    right = torch.randn(288 * 64, device=gpu)
    size = int(right.numel() * change) if 0 < change < 3 else right.numel() + int(change) // 4
    wrong = torch.randn(size, device=gpu)
    wrong[: right.numel()].copy_(right[: wrong.numel()])
    with torch.cuda.device(gpu), ThreadPoolExecutor(1) as background:
        for sent in (wrong, right):
            port = free_port()
            joining = background.submit(
                impatient.init_weights_update_group, "127.0.0.1", port, 1, 2, NAME, "nccl"
            )
            store, group = make_group("constructor", port, 2, gpu)
            joining.result(30)
            answer = background.submit(
                impatient.update_weights_from_distributed,
                *([name], ["float32"], [shape], NAME),
                fingerprint=weight_sync.fingerprint([(name, sent)]),
            )
            group.broadcast(sent, 0)
            error = answer.exception(60)
            if sent is wrong:
                assert isinstance(error, refusals), repr(error)
                assert impatient.weights_fingerprint() == before
            else:
                assert error is None
            group.abort()
            del store, group
    read = impatient.get_weights_by_name(name, truncate_size=288)
    assert torch.equal(torch.tensor(read).view(-1)[:64], right[:64].cpu())
