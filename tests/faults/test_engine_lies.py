"""Whoever lies, fails or is late in one phase of an update of an engine that generates: one whole version serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_faults import (
    PROMPT_SETS,
    FaultyEngine,
    Stream,
    changed_fingerprints,
    check_spans,
    num_arenas,
    wait_for,
)
from fault_matrix import KEPT_COPY, LIES, LOCAL_LIES, Case, Outcome, record
from versions import Reference, version_weights

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher
from weight_sync.transports.disk import write_checkpoint

OLD, NEW, NEXT = 1, 2, 3


@contextmanager
def released_after(seconds: float, engine: Any) -> Iterator[None]:
    """No breakpoint holds longer than that; none is released by this once the block is left."""
    late = threading.Timer(seconds, engine.points.clear)
    late.start()
    try:
        yield
    finally:
        late.cancel()
        late.join()


def lie(case: Case, engine: Any, publisher: WeightPublisher, folder: Path, tmp_path: Path) -> None:
    """What `case` says, with version NEW; raises what the liar, or the one that is lied to, gets."""
    new, last = version_weights(folder, NEW), case.tp_size - 1
    match case.who.removesuffix(", a copy is kept"):
        case "trainer declares a wrong fingerprint":
            with changed_fingerprints():
                publisher.publish(new, label="lie")
        case "trainer leaves tensors out":
            publisher.begin(label="lie", strict=True)
            publisher.send(dict(list(new.items())[:5]))
            publisher.commit()
        case "trainer changes the arena after the vote":
            publisher.begin(label="lie")
            publisher.send(new)
            packed = publisher._endpoint._packed
            assert packed is not None
            packed.buffer[10] ^= 1
            publisher.commit()
        case "trainer stays silent past its lease":
            publisher.begin(label="lie", lease_s=0.2)
            publisher.send(new)
            time.sleep(0.5)
            publisher.commit()
        case "trainer sets a deadline that passes":
            with WeightPublisher(engine.engine.address, timeout_s=6.0) as hasty:
                hasty.begin(label="lie")
                hasty.send(new)
                engine.points.stop("step", 0)
                engine.points.reached("step", 0)
                with released_after(60.0, engine):
                    hasty.commit()
        case "last rank raises" | "last rank raises half-way":
            engine.points.fail(case.phase, last)
            publisher.publish(new, label="lie")
        case "last rank writes a wrong byte":
            engine.points.damage(last)
            publisher.publish(new, label="lie")
        case "folder is torn" | "folder has a changed byte":
            written = write_checkpoint(tmp_path / "lie", new, version=NEW, label="lie")
            file = next(Path(written or tmp_path / "lie").glob("*.safetensors"))
            data = bytearray(file.read_bytes())
            if case.who == "folder is torn":
                del data[len(data) // 2 :]
            else:
                data[-100] ^= 1
            file.write_bytes(data)
            engine.engine.update_weights_from_disk(tmp_path / "lie")
        case _:
            raise AssertionError(case.who)


EXPECTED = {
    "trainer declares a wrong fingerprint": "FingerprintMismatch",
    "trainer leaves tensors out": "ManifestMismatch",
    "trainer changes the arena after the vote": "TornWeightsError",
    "trainer stays silent past its lease": "SessionError",
    "trainer sets a deadline that passes": "DeadlineExceeded",
    "last rank raises": "RemoteError",
    "last rank raises half-way": "TornWeightsError",
    "last rank writes a wrong byte": "TornWeightsError",
    "folder is torn": "TransportError",
    "folder has a changed byte": "FingerprintMismatch",
}


@pytest.mark.parametrize("case", LIES, ids=str)
def test_a_liar_gets_an_error_and_one_whole_version_serves(
    case: Case,
    engine_of: Callable[..., FaultyEngine],
    folder: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    engine = engine_of(tp_size=case.tp_size)
    torn = EXPECTED[case.who] == "TornWeightsError"
    with WeightPublisher(engine.engine.address) as publisher:
        publisher.publish(version_weights(folder, OLD), label=f"v{OLD}")
        stream = Stream(engine.engine, endless=True)
        start = time.monotonic()
        with pytest.raises((weight_sync.errors.SyncError, ValueError)) as caught:
            lie(case, engine, publisher, folder, tmp_path)
        assert type(caught.value).__name__ == EXPECTED[case.who], caught.value
        engine.points.clear()
        if torn:
            assert engine.engine.status().torn is not None
            with pytest.raises(weight_sync.TornWeightsError):
                engine.engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})
        else:
            engine.serves(OLD)
        publisher.publish(version_weights(folder, NEXT), label=f"v{NEXT}")
        seconds = time.monotonic() - start
        engine.serves(NEXT)
    for result in stream.stop():
        check_spans(PROMPT_SETS[0], result, reference)
    if case.transport != "disk":  # for that the engine object has a publisher of its own
        engine.holds_no_arena()
    error = EXPECTED[case.who]
    result = "the engine refuses to generate until" if torn else "the old version serves;"
    record(
        case, Outcome(result=f"{error}; {result} the next complete update commits", seconds=seconds)
    )


@pytest.mark.parametrize("case", KEPT_COPY, ids=str)
def test_with_a_kept_copy_all_ranks_roll_back_together(
    case: Case,
    engine_of: Callable[..., FaultyEngine],
    folder: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    engine = engine_of(tp_size=case.tp_size, keep_previous_weights=True)
    with WeightPublisher(engine.engine.address) as publisher:
        publisher.publish(version_weights(folder, OLD), label=f"v{OLD}")
        stream = Stream(engine.engine)
        start = time.monotonic()
        with pytest.raises(weight_sync.WeightUpdateError, match="restored and serves") as caught:
            lie(case, engine, publisher, folder, tmp_path)
        engine.serves(OLD)
        publisher.publish(version_weights(folder, NEXT), label=f"v{NEXT}")
        seconds = time.monotonic() - start
        engine.serves(NEXT)
    for result in stream.stop():
        check_spans(PROMPT_SETS[0], result, reference)
    name = type(caught.value).__name__
    told = f"{name}; all ranks go back to the old version, which serves; the next update commits"
    record(case, Outcome(result=told, seconds=seconds))


@pytest.mark.parametrize("case", LOCAL_LIES, ids=str)
def test_a_liar_in_the_engines_process_gets_an_error_and_one_whole_version_serves(
    case: Case, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    with Engine(
        folder, skip_tokenizer_init=True, kv_cache_bytes=1 << 20, keep_previous_weights=True
    ) as engine:
        with WeightPublisher(engine) as publisher:
            publisher.publish(version_weights(folder, OLD))
            start = time.monotonic()
            with pytest.raises(weight_sync.FingerprintMismatch):
                lie(case, None, publisher, folder, tmp_path)
            assert engine.status().torn is None
            seconds = time.monotonic() - start
            fingerprint = weight_sync.fingerprint(version_weights(folder, OLD))
            assert engine.weights_fingerprint() == fingerprint
            params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
            result = engine.generate(
                input_ids=PROMPT_SETS[0], sampling_params=params, return_logprob=True
            )
            assert reference.at(OLD).greedy_problem(PROMPT_SETS[0], result) is None
            publisher.publish(version_weights(folder, NEXT))
        assert engine.weights_fingerprint() == weight_sync.fingerprint(
            version_weights(folder, NEXT)
        )
    how = " from the kept copy" if case.phase == "commit" else ""
    record(
        case,
        Outcome(result=f"FingerprintMismatch; the old version serves{how}", seconds=seconds),
    )


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_arena_goes_with_its_publisher_although_nobody_says_so(
    engine_of: Callable[..., FaultyEngine], folder: Path, tp_size: int
) -> None:
    engine = engine_of(tp_size=tp_size)
    publisher = WeightPublisher(engine.engine.address)
    publisher.publish(version_weights(folder, OLD))
    before = [num_arenas(pid) for pid in engine.pids]
    publisher._endpoint._channel.close()  # type: ignore[union-attr]
    publisher.close()
    wait_for(
        "the arena let go",
        lambda: all(num_arenas(pid) < n for pid, n in zip(engine.pids, before, strict=True)),
    )


def test_a_part_of_an_update_is_a_version_of_its_own_on_both_ranks(
    engine_of: Callable[..., FaultyEngine], folder: Path
) -> None:
    engine = engine_of(tp_size=2)
    with WeightPublisher(engine.engine.address) as publisher:
        publisher.publish(version_weights(folder, OLD), label="whole")
        norm = "model.norm.weight"
        expected = {**version_weights(folder, OLD), norm: version_weights(folder, NEW)[norm]}
        report = publisher.publish({norm: expected[norm]}, strict=False)
        assert (report.updated, len(report.left)) == (1, len(expected) - 1)
    assert engine.engine.weights_fingerprint() == weight_sync.fingerprint(expected)
    assert torch.equal(
        torch.tensor(engine.engine.get_weights_by_name(norm, 1 << 16)), expected[norm]
    )
