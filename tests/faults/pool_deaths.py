"""What happens when a replica, a trainer or the owner of a pool gets a kill -9: the same for every kind of pool."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine_deaths import NEW, NEXT, OLD, all_gone, killed_trainer, publish
from engine_faults import (
    GREEDY,
    PROMPT_SETS,
    PROMPTLY_S,
    Breakpoints,
    Nursery,
    Stream,
    check_descriptors,
    check_spans,
    engine_options,
    kill_all,
    num_arenas,
    num_descriptors,
    use_breakpoints,
    wait_for,
)
from fault_matrix import GROUP, UPDATE, Case, Outcome
from forks import Zygote
from versions import Reference, version_weights

import weight_sync
from rollout import RolloutPool
from weight_sync import WeightPublisher

NUM_REPLICAS = 2
NUM_TOKENS = 100
START_S = 90.0
"""A start of a replica may take on a loaded machine."""


class FaultyPool:
    """A pool whose replicas have breakpoints, and what its clients should see."""

    def __init__(
        self, folder: Path, points: Path, reference: Reference, zygote: Zygote, **options: Any
    ) -> None:
        self.folder = folder
        self.points = Breakpoints(points)
        self.reference = reference
        use_breakpoints(points, zygote)
        self.pool = RolloutPool(
            folder,
            num_replicas=NUM_REPLICAS,
            health_interval_s=0.2,
            **engine_options(**options),
        )

    @property
    def pids(self) -> list[int]:
        """Of all replicas, in the order of their numbers."""
        return [replica.pids[0] for replica in self.pool.replicas()]

    def is_complete(self) -> bool:
        """All replicas are there and serve."""
        states = [replica.state for replica in self.pool.replicas()]
        return states == ["serving"] * NUM_REPLICAS

    def serves(self, number: int) -> None:
        """Exactly this version, on every replica, whole: by its bytes and by what it says."""
        expected = weight_sync.fingerprint(version_weights(self.folder, number))
        assert self.pool.weights_fingerprint() == expected
        assert self.pool.weight_version == f"v{number}" and self.pool.status().torn is None
        reference = self.reference.at(number)
        for replica in self.pool.replicas():
            with WeightPublisher(replica.address) as publisher:
                assert publisher.fingerprint() == expected
                info = publisher.engine_info()
                assert (info.label, info.torn) == (f"v{number}", None)
        prompts = PROMPT_SETS * 2  # Some for each: a prompt goes to the least busy replica.
        results = self.pool.generate(input_ids=prompts, sampling_params=GREEDY, return_logprob=True)
        for prompt, result in zip(prompts, results, strict=True):
            assert reference.greedy_problem(prompt, result) is None

    def holds_no_arena(self) -> None:
        """No replica maps memory of a trainer that is gone."""
        wait_for("the arena let go", lambda: all(num_arenas(pid) == 0 for pid in self.pids))

    def close(self) -> None:
        """Shut down; nothing of it may survive."""
        self.points.clear()
        pids = self.pids
        self.pool.shutdown()
        all_gone(pids)


class Clients:
    """They generate until `finish`, one long request after another; each replica has some when this is made."""

    def __init__(self, pool: RolloutPool) -> None:
        self._streams = [
            (prompt, Stream(pool, prompt, num_tokens=NUM_TOKENS))
            for prompt in (*PROMPT_SETS, [*PROMPT_SETS[0], 1])
        ]
        wait_for("work for all", lambda: all(r.num_inflight for r in pool.replicas()))

    def finish(self, reference: Reference) -> set[int]:
        """No request was lost, each token is of the version that it names; returns how often requests ran again.

        None is of the checkpoint that a new replica loads before it is brought to the version of the others.
        """
        reruns = set()
        for prompt, stream in self._streams:
            for result in stream.stop():
                assert result["meta_info"]["finish_reason"]["type"] == "length"
                assert len(result["output_ids"]) == NUM_TOKENS
                versions = check_spans(prompt, result, reference)
                assert versions == sorted(versions) and set(versions) <= {OLD, NEW, NEXT}
                reruns.add(result["meta_info"]["num_reruns"])
        return reruns


# ---- a replica -------------------------------------------------------------------------------------------------------


def replica_dies(case: Case, pool: FaultyPool, nursery: Nursery, reference: Reference) -> Outcome:
    """Kill a replica in a phase of an update; the other one goes on, and a new one takes its place."""
    folder, address = pool.folder, pool.pool.address
    publish(address, folder, OLD, case.transport)
    victim, other = pool.pool.replicas()
    descriptors = num_descriptors(other.pids[0])
    clients = Clients(pool.pool) if case.phase != "idle" else None
    trainer, whom = None, f"pid{victim.pids[0]}"
    if case.phase in UPDATE:
        pool.points.stop(case.phase, whom)
        options: dict[str, Any] = {"transport": case.transport, "label": f"v{NEW}"}
        trainer = nursery.trainer(address, folder, NEW, **options)
        pool.points.reached(case.phase, whom)
    start = time.monotonic()
    kill_all(victim.pids)
    all_gone(list(victim.pids))
    result, serves = "replaced", OLD
    if trainer is not None:
        said = trainer.says()
        assert time.monotonic() - start < PROMPTLY_S
        # A group without one of its members is none, so bytes that are still to come do not arrive.
        commits = case.transport != GROUP or case.phase in ("vote", "commit")
        assert ("version" if commits else "error") in said, said
        result, serves = ("replaced, new", NEW) if commits else ("replaced, old", OLD)
    wait_for(
        "a new replica",
        lambda: pool.is_complete() and not set(victim.pids) & set(pool.pids),
        START_S,
    )
    pool.serves(serves)
    if trainer is not None:
        trainer.kill()
    publish(address, folder, NEXT, case.transport)
    seconds = time.monotonic() - start
    if clients is not None:
        assert clients.finish(reference) == {0, 1}
    wait_for("all replicas", pool.is_complete, START_S)
    pool.serves(NEXT)
    pool.holds_no_arena()
    check_descriptors(list(other.pids), [descriptors])
    pool.points.clear()
    return Outcome(result=result, seconds=seconds)


# ---- a trainer -------------------------------------------------------------------------------------------------------


def pool_trainer_dies(
    case: Case, pool: FaultyPool, nursery: Nursery, reference: Reference
) -> Outcome:
    """Kill a trainer in a phase of its update; all replicas serve one whole version, and go on with the next."""
    folder, address = pool.folder, pool.pool.address
    publish(address, folder, OLD, case.transport)
    before, descriptors = pool.pids, [num_descriptors(pid) for pid in pool.pids]
    clients = Clients(pool.pool)
    whom = f"pid{pool.pids[-1]}"
    serves, start = killed_trainer(case, nursery, pool.points, whom, address, folder)
    wait_for("its version", lambda: pool.pool.weight_version == f"v{serves}", PROMPTLY_S)
    pool.serves(serves)
    pool.holds_no_arena()
    publish(address, folder, NEXT, case.transport)
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    pool.serves(NEXT)
    assert clients.finish(reference) == {0} and pool.pids == before  # Nobody else had to die.
    pool.holds_no_arena()
    check_descriptors(before, descriptors)
    return Outcome(result="new" if serves == NEW else "old", seconds=seconds)
