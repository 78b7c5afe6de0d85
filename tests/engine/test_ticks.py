"""Boundaries: what other threads want done between two steps, on all ranks or on none."""

from __future__ import annotations

import threading

import pytest

from rollout.engine.loop.ticks import Action, Boundaries
from weight_sync.errors import DeadlineExceeded, EngineDiedError


def test_an_action_runs_when_its_boundary_comes_and_gives_its_result() -> None:
    boundaries, action = Boundaries(patience_s=60.0), Action(lambda: 7)
    boundaries.arm("write", action)
    boundaries.run("write")
    assert action.wait(60.0) == 7


def test_an_error_of_an_action_reaches_who_asked_and_not_the_loop() -> None:
    def fail() -> None:
        raise ValueError("broken")

    boundaries, action = Boundaries(patience_s=60.0), Action(fail)
    boundaries.arm("write", action)
    boundaries.run("write")
    with pytest.raises(ValueError, match="broken"):
        action.wait(60.0)


def test_an_action_that_was_given_up_never_runs_on_any_rank() -> None:
    ran: list[int] = []
    ranks = [Boundaries(patience_s=60.0) for _ in range(2)]
    actions = [Action(lambda rank=rank: ran.append(rank)) for rank in range(2)]
    for boundaries, action in zip(ranks, actions, strict=True):
        boundaries.arm("write", action)
    with pytest.raises(DeadlineExceeded):
        actions[0].wait(0.01)
    assert not ranks[0].claim("write")
    for boundaries in ranks:
        boundaries.disarm("write")
    with pytest.raises(DeadlineExceeded, match="given up"):
        actions[1].wait(60.0)
    assert ran == []


def test_a_claimed_action_runs_even_if_its_deadline_passes() -> None:
    release = threading.Event()
    boundaries, action = Boundaries(patience_s=60.0), Action(lambda: release.wait(60.0))
    boundaries.arm("write", action)
    assert boundaries.claim("write")
    loop = threading.Thread(target=lambda: boundaries.run("write"))
    loop.start()
    timer = threading.Timer(0.1, release.set)
    timer.start()
    assert action.wait(0.01) is True
    loop.join()


def test_a_rank_waits_at_a_boundary_until_it_has_armed_its_part() -> None:
    boundaries, action = Boundaries(patience_s=60.0), Action(lambda: "done")
    timer = threading.Timer(0.05, lambda: boundaries.arm("write", action))
    timer.start()
    boundaries.run("write")
    assert action.wait(60.0) == "done"


def test_a_rank_that_never_arms_has_lost_the_others() -> None:
    with pytest.raises(DeadlineExceeded, match="nothing to do"):
        Boundaries(patience_s=0.01).run("write")


def test_a_rank_that_arms_what_was_given_up_already_is_told_so() -> None:
    boundaries, action = Boundaries(patience_s=60.0), Action(lambda: 7)
    boundaries.disarm("write")
    boundaries.arm("write", action)
    with pytest.raises(DeadlineExceeded, match="given up"):
        action.wait(60.0)


def test_a_name_that_is_armed_again_runs_once_for_each_time() -> None:
    """A session's id may come twice: its first commit missed its boundary, its second has just been asked for."""
    boundaries, ran = Boundaries(patience_s=60.0), []
    actions = [Action(lambda number=number: ran.append(number)) for number in range(3)]
    for action in actions:
        boundaries.arm("commit", action)
    with pytest.raises(DeadlineExceeded):
        actions[0].wait(0.01)
    wanted = [boundaries.claim("commit") for _ in range(4)]  # One more than was armed.
    for is_wanted in wanted:
        (boundaries.run if is_wanted else boundaries.disarm)("commit")
    assert ran == [1, 2]


def test_whoever_waits_for_a_boundary_of_a_loop_that_ends_hears_of_it_at_once() -> None:
    boundaries, claimed, waiting = Boundaries(60.0), Action(lambda: 7), Action(lambda: 7)
    boundaries.arm("claimed", claimed)
    boundaries.arm("waiting", waiting)
    assert boundaries.claim("claimed")
    boundaries.close(EngineDiedError("the loop ended"))
    late = Action(lambda: 7)
    boundaries.arm("late", late)
    for action in (claimed, waiting, late):
        with pytest.raises(EngineDiedError, match="the loop ended"):
            action.wait(60.0)


def test_what_waits_under_a_name_can_be_given_up_and_what_has_begun_or_has_another_cannot() -> None:
    boundaries, begun, waiting = Boundaries(60.0), Action(lambda: 7), Action(lambda: 7)
    other = Action(lambda: 8)
    boundaries.arm("commit/a", begun)
    boundaries.arm("commit/b", waiting)
    boundaries.arm("commit/bc", other)
    assert boundaries.claim("commit/a")
    for name in ("commit/", "commit/a", "commit/b", "commit/nobody"):
        boundaries.cancel(name)
    boundaries.run("commit/a")
    assert begun.wait(60.0) == 7
    assert not boundaries.claim("commit/b")
    with pytest.raises(DeadlineExceeded, match="given up"):
        waiting.wait(60.0)
    assert boundaries.claim("commit/bc")
    boundaries.run("commit/bc")
    assert other.wait(60.0) == 8


def test_an_action_that_raises_a_timeout_of_its_own_keeps_it() -> None:
    def fail() -> None:
        raise DeadlineExceeded("of the copy")

    boundaries, action = Boundaries(patience_s=60.0), Action(fail)
    boundaries.arm("write", action)
    boundaries.run("write")
    with pytest.raises(DeadlineExceeded, match="of the copy"):
        action.wait(60.0)


def test_a_rank_that_gave_up_alone_does_not_go_on_without_its_part() -> None:
    boundaries, action = Boundaries(patience_s=60.0), Action(lambda: 7)
    boundaries.arm("write", action)
    with pytest.raises(DeadlineExceeded):
        action.wait(0.01)
    with pytest.raises(DeadlineExceeded, match="alone"):
        boundaries.run("write")
