"""Every state that a small pool can come to, by any order of events: what `decide` says is right, and no dead end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rollout.pool.states import Facts, State, Todo, decide

FLAGS = tuple(Facts.__dataclass_fields__)
ALL = [
    Facts(**dict(zip(FLAGS, v, strict=True))) for v in itertools.product((False, True), repeat=8)
]
NEW = Facts(asked=True, finished=True)
Pool = tuple[tuple[Facts, ...], bool]
"""The replicas, in any order, and whether the memory of the weights is gone."""


def settled(replicas: list[Facts], memory_is_gone: bool) -> Pool:
    """What becomes of them when everything has been done that is to be done; it is all done at once."""
    numbered = dict(enumerate(replicas))
    after = []
    for number, (state, todo) in decide(numbered, memory_is_gone=memory_is_gone).items():
        facts = numbered[number]
        others = any(other.serves for n, other in numbered.items() if n != number)
        check_one(facts, state, todo, others)
        if state is State.SERVING:
            facts = replace(facts, tried=False)
        if todo is Todo.ASK:
            facts = replace(facts, asked=True, holds=False, denied=False, finished=True)
        elif todo is Todo.REPLACE:
            facts = NEW
        if todo is not Todo.END:
            after.append(facts)
    again = decide(dict(enumerate(after)), memory_is_gone=memory_is_gone)
    assert {todo for _, todo in again.values()} <= {Todo.NOTHING}
    return tuple(sorted(after, key=repr)), memory_is_gone


def check_one(facts: Facts, state: State, todo: Todo, others_serve: bool) -> None:
    """What is right whatever has happened before."""
    if state is State.SERVING:
        assert facts.holds and not (facts.denied or facts.dead or facts.leaving)
    if todo is Todo.ASK:
        assert state is State.COMING and not facts.asked, "it is asked once at a time"
    assert (state is State.GONE) == (todo in (Todo.REPLACE, Todo.END))
    assert (todo is Todo.END) <= facts.leaving and (todo is Todo.REPLACE) <= (not facts.leaving)
    if state is State.GONE and not (facts.dead or facts.late):
        assert others_serve or not facts.holds or facts.denied, "the version would be gone with it"
    if todo is Todo.REPLACE and not facts.dead:
        assert facts.tried and others_serve, (
            "it is replaced by one that gets the version from another"
        )


def test_each_replica_gets_one_answer_that_is_right() -> None:
    for facts, other, gone in itertools.product(ALL, (NEW, Facts(holds=True)), (False, True)):
        state, todo = decide({0: facts, 1: other}, memory_is_gone=gone)[0]
        check_one(facts, state, todo, other.serves)
        if facts.dead:
            assert state is State.GONE


def events(pool: Pool) -> Iterator[Pool]:
    """What may happen next."""
    replicas, gone = list(pool[0]), pool[1]
    yield settled(replicas, not gone)
    yield settled([replace(facts, tried=False) for facts in replicas], gone)  # Time passes.
    for missed in itertools.product((False, True), repeat=len(replicas)):  # An update.
        held = [
            replace(facts, holds=not miss and not facts.dead, tried=False)
            for facts, miss in zip(replicas, missed, strict=True)
        ]
        yield settled(held, gone)
    for i, facts in enumerate(replicas):
        serves = facts.serves or (facts.leaving and not facts.finished)
        changes = [{"dead": True}, {"holds": False}]
        changes += [{"leaving": True}] if any(r.serves for r in replicas if r is not facts) else []
        changes += [{"late": True}] if facts.leaving else []
        changes += [{"denied": True, "finished": True}, {"finished": True}] if serves else []
        changes += [{"finished": False}] if facts.serves else []
        changes += answers(facts)
        for change in changes:
            yield settled([*replicas[:i], replace(facts, **change), *replicas[i + 1 :]], gone)


def answers(facts: Facts) -> list[dict[str, bool]]:
    """How bringing it up may end."""
    done = {"asked": False, "holds": True, "tried": False}
    return [done, {"asked": False, "holds": False, "tried": True}] if facts.asked else []


@pytest.fixture(scope="module")
def reachable() -> set[Pool]:
    """Every state of a pool of three."""
    first = settled([NEW] * 3, False)
    seen, left = {first}, [first]
    while left:
        for pool in events(left.pop()):
            if pool not in seen:
                seen.add(pool)
                left.append(pool)
    return seen


def test_a_pool_comes_to_many_states_and_each_is_right(reachable: set[Pool]) -> None:
    assert len(reachable) > 2000  # Checked where they were made.
    states = {
        state
        for replicas, gone in reachable
        for state, _ in decide(dict(enumerate(replicas)), memory_is_gone=gone).values()
    }
    assert states == {State.COMING, State.SERVING, State.BEHIND, State.RETIRING}


def test_from_each_of_them_all_serve_again_when_all_goes_well(reachable: set[Pool]) -> None:
    for pool in reachable:
        staying = sum(not facts.leaving for facts in pool[0])
        for _ in range(4):
            well = [
                replace(facts, **answers(facts)[0])
                if facts.asked
                else replace(facts, finished=True, tried=False)
                for facts in pool[0]
            ]
            pool = settled(well, False)
        assert sum(facts.serves for facts in pool[0]) == len(pool[0])
        assert len(pool[0]) == staying


def test_while_nothing_goes_well_nobody_is_asked_without_an_end(reachable: set[Pool]) -> None:
    for replicas, gone in reachable:
        after: Pool = (replicas, gone)
        for _ in range(4):
            failed = [replace(r, **answers(r)[1]) if r.asked else r for r in after[0]]
            after = settled(failed, gone)
        serving = [facts for facts in after[0] if facts.serves]
        # Who cannot be brought up is replaced as long as another serves; else all come to rest.
        assert serving or not any(facts.asked for facts in after[0])
