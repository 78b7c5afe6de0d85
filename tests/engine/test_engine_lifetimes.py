"""One engine to an address; stops, forks and lost servers; an engine's own calls cancelled, or not finite."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped import go_on, stop

from rollout import Engine
from rollout.engine.executors import local
from weight_sync.errors import (
    AddressInUseError,
    EngineDiedError,
    ForkedProcessError,
    NonFiniteWeightsError,
)
from weight_sync.wire import rpc_wire
from weight_sync.wire.rpc_client import RpcClient

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "kv_cache_bytes": 1 << 20}
GREEDY = {"max_new_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def inline(folder: Path) -> Iterator[Engine]:
    with Engine(folder, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def child(folder: Path, tmp_path: Path) -> Iterator[Engine]:
    with Engine(folder, executor="local", listen=f"ipc://{tmp_path}/socket", **OPTIONS) as engine:
        yield engine


def tokens(engine: Engine) -> Any:
    return engine.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)["output_ids"]


def one_tensor(engine: Engine, value: float) -> dict[str, torch.Tensor]:
    shape = torch.tensor(engine.get_weights_by_name("model.norm.weight")).shape
    return {"model.norm.weight": torch.full(shape, value)}


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["local", "inline"])
def test_a_second_engine_at_an_address_is_refused_before_anything_is_started(
    executor: str, child: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tokens(child)

    def started(*arguments: Any) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(local, "RankProcess", started)
    with pytest.raises(AddressInUseError, match="another server listens"):
        Engine(folder, executor=executor, listen=child.address, **OPTIONS)
    assert tokens(child) == before


def test_an_engine_of_this_process_listens_at_once_where_it_was_told_to(
    folder: Path, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/inline"
    with Engine(folder, listen=address, **OPTIONS):
        assert (tmp_path / "inline").exists()
        with pytest.raises(AddressInUseError):
            Engine(folder, listen=address, **OPTIONS)
    with Engine(folder, listen=address, **OPTIONS) as again:
        assert len(tokens(again)) == 4


# ---- stops and forks -------------------------------------------------------------------------------------------------


def test_an_engine_that_was_stopped_goes_on_with_the_call_that_was_under_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_wire, "HEARTBEAT_INTERVAL_MS", 50)
    monkeypatch.setattr(rpc_wire, "HEARTBEAT_TIMEOUT_MS", 200)
    with Engine(folder, executor="local", **OPTIONS) as engine:
        pid = engine.status().pid
        expected = tokens(engine)

        async def stop_meanwhile() -> Any:
            stop(pid)
            asked = asyncio.create_task(
                engine.async_generate(input_ids=[1, 2, 3], sampling_params=GREEDY)
            )
            await asyncio.sleep(0.8)
            go_on(pid)
            return (await asked)["output_ids"]

        assert asyncio.run(stop_meanwhile()) == expected
        assert tokens(engine) == expected


def _use_in_vain(engine: Engine) -> None:
    signal.alarm(10)
    try:
        with engine:
            for call in (
                lambda: tokens(engine),
                engine.status,
                lambda: engine.update_weights_from_tensor({}),
                lambda: engine.address,
            ):
                with pytest.raises(ForkedProcessError):
                    call()
        engine._finalizer()  # as a child does that ends in an orderly way
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_forked_child_is_refused_at_once_and_leaves_its_parents_engine_alone(
    child: Engine, inline: Engine
) -> None:
    for engine in (child, inline):
        expected = tokens(engine)
        pid = os.fork()
        if pid == 0:
            _use_in_vain(engine)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert tokens(engine) == expected
        client = RpcClient(engine.address, object, errors={})
        client.close()


OWNER = """
import os, sys, time
from rollout import Engine
engine = Engine(sys.argv[1], executor="local", skip_tokenizer_init=True, kv_cache_bytes=1 << 20)
print(engine.status().pid, flush=True)
forked = os.fork()
if forked == 0:
    time.sleep(60)  # holds a copy of every descriptor of its parent
    os._exit(0)
print(forked, flush=True)
time.sleep(60)
"""


def test_an_engine_ends_with_its_owner_although_a_forked_child_of_it_lives(folder: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(OWNER), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    engine, forked = int(owner.stdout.readline()), int(owner.stdout.readline())
    try:
        owner.kill()
        owner.wait(10)
        end = time.monotonic() + 10
        while _lives(engine) and time.monotonic() < end:
            time.sleep(0.02)
        assert not _lives(engine)
        assert _lives(forked)
    finally:
        os.kill(forked, signal.SIGKILL)
        owner.stdout.close()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_nobody_can_reach_any_more_ends_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(folder, **OPTIONS) as engine:
        client = RpcClient(engine.address, object, errors={})

        def starved() -> None:
            raise MemoryError("none left")

        monkeypatch.setattr(engine._executor._server, "_flush", starved)  # type: ignore[attr-defined]
        engine._executor._server._wake.set()  # type: ignore[attr-defined]
        end = time.monotonic() + 10
        with pytest.raises(EngineDiedError, match="MemoryError"):
            while time.monotonic() < end:
                engine.status()
                time.sleep(0.01)
        client.close()


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_no_update_call_takes_what_is_not_finite_unless_it_is_told_to(inline: Engine) -> None:
    before = inline.weights_fingerprint()
    wrong = one_tensor(inline, float("nan"))
    with pytest.raises(NonFiniteWeightsError, match=r"model\.norm\.weight"):
        inline.update_weights_from_tensor(wrong)
    inline.begin_weight_update()
    with pytest.raises(NonFiniteWeightsError):
        inline.update_weights_from_tensor(wrong)
    inline.abort_weight_update()
    assert inline.weights_fingerprint() == before
    inline.update_weights_from_tensor(wrong, check_finite=False)
    assert inline.weights_fingerprint() != before
    inline.update_weights_from_tensor(one_tensor(inline, 1.0))


def test_a_cancelled_update_call_commits_nothing(child: Engine) -> None:
    version = child.status().version
    good = one_tensor(child, 2.0)

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in good.items():
            time.sleep(0.3)
            yield name, tensor

    async def cancel() -> None:
        task = asyncio.create_task(child.async_update_weights_from_tensor(slowly()))
        await asyncio.sleep(0.15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await child.async_update_weights_from_tensor(good)

    asyncio.run(cancel())
    assert child.status().version == version + 1


# ---- clients of an engine that another process started ---------------------------------------------------------------


def test_a_client_has_every_method_and_leaves_the_engine_alone(child: Engine) -> None:
    expected, version = tokens(child), child.version
    with Engine.connect(child.address) as client:
        assert tokens(client) == expected
        assert client.config.skip_tokenizer_init
        assert client.status().pid == child.status().pid
        report = client.publish(one_tensor(client, 3.0), strict=False, label=17)
        assert (report.version, client.version) == (version + 1, version + 1)
        assert client.weight_version == child.weight_version == "17"
        assert client.weights_fingerprint() == child.weights_fingerprint()
        client.pause_generation("in_place")
        client.continue_generation()
        assert asyncio.run(client.async_generate(input_ids=[1, 2, 3], sampling_params=GREEDY))
    assert len(tokens(child)) == 4
    with pytest.raises(EngineDiedError, match="nobody answers"):
        Engine.connect(child.address + "-other", timeout_s=0.3)
