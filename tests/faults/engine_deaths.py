"""What happens when a trainer or a rank gets a kill -9: the same course of events for every kind of engine."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engine_faults import (
    PROMPT_SETS,
    PROMPTLY_S,
    Actor,
    Breakpoints,
    FaultyEngine,
    Nursery,
    Stream,
    check_descriptors,
    check_spans,
    error_name,
    is_alive,
    kill_all,
    wait_for,
    what_it_does,
)
from fault_matrix import DISK, GROUP, UPDATE, Case, Outcome
from shm import shm_names
from versions import Reference, version_weights

from rollout.errors import ERRORS
from rollout.protocol.commands import Generate, PromptSpec
from rollout.protocol.wire import REPLY_TYPES
from rollout.sampling_params import SamplingParams
from weight_sync import WeightPublisher
from weight_sync.errors import EngineDiedError
from weight_sync.transports.disk import write_checkpoint
from weight_sync.wire.rpc import RpcClient

OLD, NEW, NEXT = 1, 2, 3
SWEEP_S = 0.2
"""Longer than the interval at which ranks with breakpoints look after their trainers."""


class Background:
    """An action on a thread, and its error."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self.error = error

    def error_name(self) -> str:
        """Wait for its end, which must be an error, and name it."""
        self._thread.join(PROMPTLY_S + 5)
        assert not self._thread.is_alive(), "a caller still waits"
        return type(self.error).__name__


def publish(address: str, folder: Path, number: int, transport: Any = "auto") -> None:
    """Make a version the next one, from this process."""
    transport = "auto" if transport == DISK else transport
    with WeightPublisher(address, transport=transport, timeout_s=20.0) as publisher:
        publisher.publish(version_weights(folder, number), label=f"v{number}")


def all_gone(pids: list[int], timeout_s: float = PROMPTLY_S) -> None:
    """Wait until none of them is alive; the error says which still are, and what they do."""
    end = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > end:
            numbers = ", ".join(f"number {pids.index(pid)} is {what_it_does(pid)}" for pid in alive)
            time.sleep(1.0)  # for what they say themselves
            raise AssertionError(f"processes are alive after {timeout_s:.3g} s; {numbers}")
        time.sleep(0.005)


def fails(action: Callable[[], object]) -> bool:
    """Whether it says that the engine is dead."""
    try:
        action()
    except EngineDiedError:
        return True
    return False


# ---- a trainer -------------------------------------------------------------------------------------------------------


def killed_trainer(
    case: Case,
    nursery: Nursery,
    points: Breakpoints,
    whom: int | str,
    address: str,
    folder: Path,
) -> tuple[int, float]:
    """Kill a trainer while `whom` is in a phase of its update; which version serves then, and since when."""
    commits = case.phase not in ("begin", "stage")
    # Over a group the ranks themselves wait, for bytes that never come.
    halfway = case.transport == GROUP and case.phase == "stage"
    stops = case.phase != "idle" and not halfway
    if stops:
        points.stop(case.phase, whom)
    trainer = nursery.trainer(
        address,
        folder,
        NEW,
        commits=commits,
        transport=case.transport,
        halfway=halfway,
        label=f"v{NEW}",
    )
    if stops:
        points.reached(case.phase, whom)
    else:
        assert ("halfway" if halfway else "version") in trainer.says()
    time.sleep(SWEEP_S)
    trainer.kill()
    if not halfway:
        time.sleep(SWEEP_S)
    start = time.monotonic()
    points.clear()
    # An update that was all there is committed, whoever sent it; of any other nothing is left.
    return NEW if commits else OLD, start


def trainer_dies(
    case: Case, engine: FaultyEngine, nursery: Nursery, reference: Reference
) -> Outcome:
    """Kill a trainer in a phase of its update; the engine serves one whole version, and goes on with the next."""
    folder, address = engine.folder, engine.address
    publish(address, folder, OLD, case.transport)
    engine.holds_no_arena()
    descriptors, names = engine.allowed_descriptors(), shm_names()
    stream = Stream(engine.engine)
    whom = engine.whom(case.tp_size - 1)
    serves, start = killed_trainer(case, nursery, engine.points, whom, address, folder)
    engine.holds_no_arena()
    wait_for("its version", lambda: engine.engine.get_weight_version() == f"v{serves}", 10)
    engine.serves(serves)
    publish(address, folder, NEXT, case.transport)
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    engine.serves(NEXT)
    for result in stream.stop():
        check_spans(PROMPT_SETS[0], result, reference)
    engine.holds_no_arena()
    check_descriptors(engine.pids, descriptors)
    assert shm_names() <= names
    return Outcome(result="new" if serves == NEW else "old", seconds=seconds)


# ---- a rank ----------------------------------------------------------------------------------------------------------


def rank_dies(case: Case, engine: FaultyEngine, nursery: Nursery, tmp_path: Path) -> Outcome:
    """Kill a rank in a phase of an update; the engine ends, all of it, and nobody waits for it."""
    pids, rank = engine.pids, int(case.who.split()[1])
    stream = Stream(engine.engine) if case.phase != "idle" else None
    update: Callable[[], str] | None = None
    if case.phase in UPDATE:
        engine.points.stop(case.phase, rank)
        update = begin_update(case, engine, nursery, tmp_path)
        engine.points.reached(case.phase, rank)
    start = time.monotonic()
    kill_all([pids[rank]])
    if stream is not None:
        assert isinstance(stream.died(), EngineDiedError)
    # A rank 0 that lives may answer a last question by itself, before it misses the other one.
    wait_for("the engine's end", partial(fails, engine.engine.status), PROMPTLY_S)
    assert error_name(engine.engine.status) == "EngineDiedError"
    assert error_name(engine.engine.weights_fingerprint) == "EngineDiedError"
    all_gone(pids)
    if update is not None:
        told = update()
        # The rank that is left may find out first, and say that it could not finish the update; over a group, where its
        # NCCL tells it, that its receiving failed: what one rank refuses is told before the death of another.
        over_group = ("TransportError",) if case.transport == GROUP else ()
        assert told in ("EngineDiedError", "TornWeightsError", "WeightUpdateError", *over_group)
        if rank == 0:
            assert told == "EngineDiedError"
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    return Outcome(result="ends", seconds=seconds)


def begin_update(
    case: Case, engine: FaultyEngine, nursery: Nursery, tmp_path: Path
) -> Callable[[], str]:
    """Begin an update that will not succeed; call the answer for the name of its error."""
    if case.transport == DISK:
        checkpoint = tmp_path / "checkpoint"
        write_checkpoint(checkpoint, version_weights(engine.folder, NEW), version=NEW, label="new")
        update = Background(lambda: engine.engine.update_weights_from_disk(checkpoint))
        return update.error_name
    trainer = nursery.trainer(engine.address, engine.folder, NEW, transport=case.transport)

    def answer() -> str:
        error: str = trainer.says().get("error", "nothing")
        if not trainer.goes_on:
            trainer.kill()
        return error

    return answer


# ---- an owner --------------------------------------------------------------------------------------------------------


def owner_dies(
    case: Case, owner: Actor, points: Breakpoints, whom: int | str, nursery: Nursery, folder: Path
) -> Outcome:
    """Kill the process that owns an engine while `whom` is in a phase of an update; all of the engine ends with it."""
    said = owner.says()
    trainer, client = None, RemoteClient(said["address"])
    if case.phase in UPDATE:
        points.stop(case.phase, whom)
        trainer = nursery.trainer(said["address"], folder, NEW, transport=case.transport)
        points.reached(case.phase, whom)
    start = time.monotonic()
    owner.kill()
    assert client.error_name() == "EngineDiedError"
    all_gone(said["pids"])
    if trainer is not None:
        assert trainer.says()["error"] == "EngineDiedError"
        trainer.kill()
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    return Outcome(result="ends too", seconds=seconds)


class RemoteClient:
    """Another client than the owner, which generates, one long request after another, until it gets an error."""

    def __init__(self, address: str) -> None:
        self._client = RpcClient(address, REPLY_TYPES, errors=ERRORS)
        self._started = threading.Event()
        self._requests = Background(self._run)
        assert self._started.wait(30)

    def _run(self) -> None:
        params = SamplingParams(max_new_tokens=450, ignore_eos=True)
        while True:
            prompt = PromptSpec(rid=secrets.token_hex(8), input_ids=PROMPT_SETS[0], params=params)
            body = Generate(prompts=[prompt], stream=True)
            self._client.submit(body, 60.0, lambda _: self._started.set()).result(60.0)

    def error_name(self) -> str:
        """Wait for its error."""
        name = self._requests.error_name()
        self._client.close()
        return name
