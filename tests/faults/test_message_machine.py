"""Whole sequences of messages, in any order and with whatever they name, against an engine and a pool.

Nothing that arrives ends the loop; each message gets one answer of a type that callers know; an update that was
answered with success is served, whole, and no other is; and when all is quiet a trainer publishes as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from kinds_of_engines import KINDS, engine_of_kind

from rollout.errors import ERRORS, WeightUpdateError
from rollout.protocol import commands as cmd
from rollout.sampling_params import SamplingParams
from weight_sync.layout.fingerprints import ArenaFingerprints
from weight_sync.layout.manifest import Manifest
from weight_sync.layout.tensor_sums import combine
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.transports.shared_memory import SharedMemoryArena
from weight_sync.wire import messages as wm
from weight_sync.wire.process import current_process

PATIENCE_S = 30.0
NUM_ARENAS = 3
SESSIONS = st.sampled_from(["a", "a", "a", "b", "nobody's"])
EPOCHS = st.sampled_from([0, 0, "its", "its", 1, 99])
TIMEOUTS = st.sampled_from([20.0] * 8 + [1e-3, 1e-6])
"""Of a call, and of a commit's wait for its boundary: some are missed."""
TAGS = st.sampled_from([["weights"], ["kv_cache"], ["weights", "kv_cache"], []])


class CountedCall:
    """A call in the hands of an engine of this process; says how often it was answered."""

    peer = "machine"

    def __init__(self, body: Any, timeout_s: float) -> None:
        self.body = body
        self.deadline = time.monotonic() + timeout_s
        self.num_answers = 0
        self.future: Future[Any] = Future()

    def reply(self, body: Any) -> None:
        self.num_answers += 1
        if not self.future.done():
            self.future.set_result(body)

    def stream(self, body: Any) -> None:
        assert not self.num_answers, "a chunk after the answer"

    def fail(self, error: BaseException) -> None:
        self.num_answers += 1
        if not self.future.done():
            self.future.set_exception(error)


class Wire:
    """Sends messages as they are, without any of what publishers and clients check and keep in order."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._core = getattr(engine._executor, "_core", None)

    def submit(self, body: Any, timeout_s: float) -> tuple[Future[Any], CountedCall | None]:
        if self._core is None:
            if isinstance(body, wm.WeightRequest):
                return self._engine.weight_channel().submit(body, timeout_s), None
            return self._engine._executor.submit(body, timeout_s=timeout_s), None
        call = CountedCall(body, timeout_s)
        self._core.submit(call)
        return call.future, call

    def ask(self, body: Any) -> Any:
        return self.submit(body, PATIENCE_S)[0].result(PATIENCE_S)


class Messages(RuleBasedStateMachine):
    """`sent` are messages without an answer yet; `resident` is what a served version holds, by tensor."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine, self.wire = engine, Wire(engine)
        self.sent: list[tuple[Any, Future[Any], CountedCall | None]] = []
        self.epochs: dict[str, int] = {}

    @initialize()
    def start(self) -> None:
        info = self.wire.ask(wm.Hello())
        self.version = info.version
        self.manifest = Manifest.from_wire(info.manifest)
        self.names = [meta.name for meta in self.manifest.tensors]
        self.arenas = [SharedMemoryArena(self.manifest.arena_bytes) for _ in range(NUM_ARENAS)]
        self.declared = []
        for number, arena in enumerate(self.arenas):
            for view in self.manifest.views(arena.buffer):
                view.fill_(0.01 * (number + 1))
            values = ArenaFingerprints(self.manifest).values(arena.buffer)
            self.declared.append(values.numpy().astype(np.uint64))
        self.fingerprints = {combine(self.names, list(map(int, v))) for v in self.declared}
        handles = [self.wire.ask(wm.OpenArena(handle=arena.handle)) for arena in self.arenas]
        self.arena_ids = [opened.arena_id for opened in handles]
        self.fingerprints.add(self.wire.ask(wm.GetFingerprint()).fingerprint)

    # ---- messages ----------------------------------------------------------------------------------------------------

    def send(self, body: Any, timeout_s: float = PATIENCE_S) -> None:
        self.sent.append((body, *self.wire.submit(body, timeout_s)))

    def epoch(self, session: str, epoch: int | str) -> int:
        return self.epochs.get(session, 7) if isinstance(epoch, str) else epoch

    @rule(
        session=SESSIONS,
        arena=st.integers(0, NUM_ARENAS),
        version=st.sampled_from([None, None, None, 0, 1 << 40]),
        manifest=st.sampled_from(["known", "sent", "sent", "unknown"]),
        verify=st.sampled_from(["pause", "overlapped"]),
        kv_policy=st.sampled_from([None, "keep", "recompute", "flush"]),
        lease_s=st.sampled_from([0.01, 0.1, 60.0, 60.0]),
        timeout_s=TIMEOUTS,
    )
    def begin(
        self, session: str, arena: int, version: int | None, manifest: str, **how: Any
    ) -> None:
        timeout_s = how.pop("timeout_s")
        if version == 1 << 40:  # above all others, and never again
            version = self.version + 1
        body = wm.Begin(
            session_id=session,
            holder=current_process(),
            version=version,
            base_version=None,
            label=None,
            manifest_digest="0" * 64 if manifest == "unknown" else self.manifest.digest,
            manifest=self.manifest.to_wire() if manifest == "sent" else None,
            arena_id=self.arena_ids[arena] if arena < NUM_ARENAS else 1 << 30,
            strict=True,
            **how,
        )
        self.send(body, timeout_s)

    @rule(
        session=SESSIONS,
        epoch=EPOCHS,
        arena=st.integers(0, NUM_ARENAS - 1),
        part=st.sampled_from(
            ["all", "all", "all", "half", "other half", "none", "twice", "beyond"]
        ),
        timeout_s=TIMEOUTS,
    )
    def bucket(self, session: str, epoch: Any, arena: int, part: str, timeout_s: float) -> None:
        num = len(self.names)
        rows = {
            "half": list(range(0, num, 2)),
            "other half": list(range(1, num, 2)),
            "none": [],
            "twice": [0, 0],
            "beyond": [num],
        }.get(part, list(range(num)))
        values = self.declared[arena][np.array(rows, dtype=np.int64) % num]
        body = wm.Bucket(
            session_id=session,
            epoch=self.epoch(session, epoch),
            indices=np.array(rows, dtype="<u4").tobytes(),
            fingerprints=values.astype("<u8").tobytes(),
        )
        self.send(body, timeout_s)

    @rule(session=SESSIONS, epoch=EPOCHS)
    def vote(self, session: str, epoch: Any) -> None:
        self.send(wm.Vote(session_id=session, epoch=self.epoch(session, epoch)))

    @rule(session=SESSIONS, epoch=EPOCHS, timeout_s=TIMEOUTS, waits_s=TIMEOUTS)
    def commit(self, session: str, epoch: Any, timeout_s: float, waits_s: float) -> None:
        body = wm.Commit(session_id=session, epoch=self.epoch(session, epoch), timeout_s=waits_s)
        self.send(body, timeout_s)

    @rule(session=SESSIONS, epoch=EPOCHS)
    def abort(self, session: str, epoch: Any) -> None:
        body = wm.Abort(session_id=session, epoch=self.epoch(session, epoch), reason="machine")
        self.send(body)

    @rule(
        arena=st.integers(0, NUM_ARENAS - 1),
        commits=st.sampled_from(["", "in time", "in time", "late"]),
        ends=st.booleans(),
    )
    def whole_update(self, arena: int, commits: str, ends: bool) -> None:
        """What a trainer sends, all at once; the commit may miss its boundary, or never come."""
        if ends:
            self.abort("a", 0)
        how = {"verify": "pause", "kv_policy": None, "lease_s": 60.0, "timeout_s": 20.0}
        self.begin("a", arena, None, "sent", **how)
        self.bucket("a", 0, arena, "all", 20.0)
        if commits:
            self.commit("a", 0, 20.0, 1e-6 if commits == "late" else 20.0)

    @rule(
        body=st.sampled_from(
            [
                wm.Hello(),
                wm.GetIgnored(names=("x", "rotary_emb.inv_freq")),
                wm.GetFingerprint(),
                wm.OpenArena(handle=wm.LocalHandle(key="nobody's", num_bytes=4096)),
                wm.OpenArena(
                    handle=wm.GroupHandle(owner=current_process(), group_name="g", num_bytes=9)
                ),
                wm.CloseArena(arena_id=1 << 30),
                wm.LeaveGroup(group_name="g"),
                wm.JoinGroup(
                    group_name="g",
                    master_address="127.0.0.1",
                    master_port=1,
                    rank_offset=1,
                    world_size=2,
                    backend="gloo",
                    timeout_s=0.05,
                ),
                cmd.GetStatus(),
                cmd.FlushCache(),
                cmd.ContinueGeneration(),
                cmd.PauseGeneration(mode="abort", lease_s=0.02),
                cmd.PauseGeneration(mode="retract", lease_s=60.0),
                cmd.PauseGeneration(mode="in_place", lease_s=0.02),
                cmd.AbortRequests(rids=["r-1"]),
                cmd.AbortRequests(abort_all=True),
                cmd.GetWeights(name="model.norm.weight"),
                cmd.GetWeights(name="nobody's"),
            ]
        ),
        timeout_s=TIMEOUTS,
    )
    def another_message(self, body: Any, timeout_s: float) -> None:
        self.send(body, timeout_s)

    @rule(session=SESSIONS, epoch=EPOCHS)
    def receive(self, session: str, epoch: Any) -> None:
        body = wm.Receive(
            session_id=session,
            epoch=self.epoch(session, epoch),
            group_name="g",
            names=(self.names[0],),
            dtypes=("float32",),
            shapes=((1,),),
            layout="tensors",
            timeout_s=1.0,
        )
        self.send(body)

    @rule(tags=TAGS, resumes=st.booleans(), keeps=st.booleans())
    def memory(self, tags: Any, resumes: bool, keeps: bool) -> None:
        self.send(
            cmd.ResumeMemory(tags=tags)
            if resumes
            else cmd.ReleaseMemory(tags=tags, keep_weights=keeps)
        )

    @rule(number=st.integers(1, 2), num_tokens=st.integers(1, 20), timeout_s=TIMEOUTS)
    def generate(self, number: int, num_tokens: int, timeout_s: float) -> None:
        params = SamplingParams(
            max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True, n=number
        )
        spec = cmd.PromptSpec(rid=f"r-{number}", input_ids=[5, 9, 2], params=params)
        self.send(cmd.Generate(prompts=[spec], stream=number > 1), timeout_s)

    # ---- what must hold ----------------------------------------------------------------------------------------------

    @rule()
    def all_are_answered(self) -> None:
        """By one answer each, of a type that callers know; requests that wait for somebody are ended first."""
        for body in (cmd.ContinueGeneration(), cmd.AbortRequests(abort_all=True)):
            self.wire.ask(body)
        sent, self.sent = self.sent, []
        for body, future, call in sent:
            error = future.exception(PATIENCE_S)
            known = type(error).__name__
            assert error is None or ERRORS.get(known) is type(error), (body, error)
            assert known != "EngineDiedError", (body, error)
            assert call is None or call.num_answers == 1, body
            if error is None and isinstance(future.result(), wm.BeginReply):
                self.epochs[body.session_id] = future.result().epoch
            if error is None and isinstance(body, wm.OpenArena):
                self.wire.ask(wm.CloseArena(arena_id=future.result().arena_id))
            if error is None and isinstance(body, wm.Commit):
                assert future.result().version > self.version
                self.version = future.result().version
                assert future.result().fingerprint in self.fingerprints
        info = self.wire.ask(wm.Hello())
        assert info.version >= self.version
        self.version = info.version

    @rule()
    def what_is_served_is_whole(self) -> None:
        status = self.wire.ask(cmd.GetStatus())
        end = time.monotonic() + PATIENCE_S
        while status.torn is None and "weights" not in status.released:
            try:
                assert self.wire.ask(wm.GetFingerprint()).fingerprint in self.fingerprints
                return
            except WeightUpdateError as error:
                # Another rank may still be about to hear that a release was refused, or its resumption.
                assert "released" in str(error) and time.monotonic() < end

    def teardown(self) -> None:
        try:
            self.all_are_answered()
            self.what_is_served_is_whole()
            self.a_trainer_publishes_as_ever()
        finally:
            for arena_id, arena in zip(self.arena_ids, self.arenas, strict=True):
                self.wire.ask(wm.CloseArena(arena_id=arena_id))
                arena.close()

    def a_trainer_publishes_as_ever(self) -> None:
        self.wire.ask(cmd.ResumeMemory(tags=["weights", "kv_cache"]))
        for session in ("a", "b", "nobody's"):
            self.wire.ask(wm.Abort(session_id=session, epoch=0, reason="the end"))
        views = self.manifest.views(self.arenas[0].buffer)
        tensors = dict(zip(self.names, [view + 0.5 for view in views], strict=True))
        with WeightPublisher(self.engine, timeout_s=PATIENCE_S) as publisher:
            report = publisher.publish(tensors)
        assert report.version > self.version
        assert self.engine.weights_fingerprint() == report.fingerprint
        greedy = {"max_new_tokens": 3, "temperature": 0.0, "ignore_eos": True}
        result = self.engine.generate(input_ids=[5, 9, 2], sampling_params=greedy)
        assert len(result["output_ids"]) == 3
        status = self.wire.ask(cmd.GetStatus())
        assert (status.torn, status.paused, status.released) == (None, None, [])
        assert (status.num_running, status.num_waiting) == (0, 0)
        assert status.num_free_blocks == status.num_blocks


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Iterator[Any]:
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    options: dict[str, Any] = {
        "kv_cache_bytes": 1 << 20,
        "skip_tokenizer_init": True,
        "num_threads": 1,
        "request_timeout_s": PATIENCE_S,
    }
    made: Any = engine_of_kind(request.param, folder, **options)
    with made as engine:
        yield engine
        if (
            request.param == "pool of two"
        ):  # one may have been replaced, and its successor be starting
            end = time.monotonic() + PATIENCE_S
            while [replica.state for replica in made.replicas()] != ["serving"] * 2:
                assert time.monotonic() < end, made.replicas()
                time.sleep(0.05)


@pytest.mark.slow
def test_no_sequence_of_messages_ends_an_engine_or_is_left_without_an_answer(engine: Any) -> None:
    run_state_machine_as_test(
        lambda: Messages(engine),
        settings=settings(
            max_examples=20,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
