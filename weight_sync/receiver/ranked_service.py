"""One service in front of all ranks of an engine: rank 0 has it, and a trainer need not know how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..errors import EngineDiedError
from ..joint.members import Member, same, tell_all
from ..joint.service import JointService
from ..joint.session import PATIENCE_S
from ..wire.channel import Channel
from ..wire.futures import answer, fail, when_all_are_done
from ..wire.messages import Ack, JoinGroup


class RankedService(JointService):
    """Serves trainers on behalf of all ranks; `ranks[0]` is this process's own, and is told last.

    What one rank is told all carry out, even when the caller has given up by then: some messages are collectives.
    """

    patience_s = PATIENCE_S
    in_step = True

    def __init__(
        self,
        ranks: Sequence[Channel],
        *,
        name: str = "ranks",
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`on_lost` hears of it when a rank cannot go on, and with it the engine."""
        self._on_lost = on_lost
        members = [Member(name=f"rank {i}", channel=rank) for i, rank in enumerate(ranks)]
        super().__init__(members, name=name)

    def close(self, *, wait: bool = True) -> None:
        """Stop, fail what is queued or under way, and close the channels. Safe to repeat."""
        super().close()
        for member in self._members:
            member.channel.close()

    def wait(self, future: Future[Any], timeout_s: float) -> Any:
        try:
            return super().wait(future, timeout_s)
        except EngineDiedError as error:
            self._on_lost(error)
            raise

    def _join(self, message: JoinGroup, end: float) -> Any:
        """Joining waits for other processes: the answer comes later, and other calls go on meanwhile.

        Every rank adds its own number to the engine's offset.
        """
        joined: Future[Ack] = Future()
        asked = tell_all(same(self._members, message), self.patience_s).values()

        def note(one: Future[Any]) -> None:
            error = one.exception()
            if error is not None:
                fail(joined, error)

        for one in asked:
            one.add_done_callback(note)
        when_all_are_done(asked, lambda: answer(joined, Ack()))
        return joined
