"""Whoever is late is told the limit that the caller gave, and not what was left of it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest

from rollout.distributed.ray_runtime import ActorCall
from weight_sync.errors import DeadlineExceeded
from weight_sync.wire.deadline import Deadline


def test_a_step_of_an_update_that_is_not_answered_names_the_updates_limit() -> None:
    deadline = Deadline(0.2)
    time.sleep(0.1)
    with pytest.raises(DeadlineExceeded, match=r"Commit was not answered within the 0\.200 s"):
        deadline.wait(Future(), "Commit")


def test_so_does_one_whose_wire_gives_up_first() -> None:
    deadline = Deadline(0.05)
    late: Future[Any] = Future()
    late.set_exception(DeadlineExceeded("Commit was not answered within 0.003 s by ipc://x"))
    assert deadline.left_s("Commit") > 0
    with pytest.raises(DeadlineExceeded, match=r"within 0\.003 s by ipc://x$"):
        deadline.wait(late, "Commit")  # the engine's own deadline; this one is not over

    class Slow(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            time.sleep(timeout or 0.0)
            return late.result()

    with pytest.raises(DeadlineExceeded, match=r"by ipc://x \(.* last of 0\.050 s for the whole"):
        deadline.wait(Slow(), "Commit")


class SilentRay:
    """As much of Ray as a call needs of which nothing is heard."""

    class exceptions:
        class RayError(Exception):
            pass

        class GetTimeoutError(RayError):
            pass

    def get(self, reference: object, timeout: float) -> None:
        raise self.exceptions.GetTimeoutError


@pytest.mark.parametrize(("whole_s", "named"), [(None, "0.1 s"), (120.0, "120 s")])
def test_an_actor_that_does_not_answer_a_start(whole_s: float | None, named: str) -> None:
    call = ActorCall(SilentRay(), object(), "start")
    with pytest.raises(DeadlineExceeded, match=f"start: .* within {named}; .*start_timeout_s"):
        call.result(0.1, whole_s)
