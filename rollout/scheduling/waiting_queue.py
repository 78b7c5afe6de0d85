"""Waiting requests in order of arrival."""

from __future__ import annotations

import heapq

from ..types import RequestStatus
from .request import Request


class WaitingQueue:
    """A heap by arrival: whoever comes back after a retraction stands where it stood before.

    A request that stops waiting while it is queued is not searched for; it is dropped when it comes up.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[int, Request]] = []

    def push(self, request: Request) -> None:
        """Queue a waiting request."""
        heapq.heappush(self._entries, (request.arrival, request))

    def first(self) -> Request | None:
        """Who waits and came first; None: nobody waits."""
        while self._entries:
            request = self._entries[0][1]
            if request.status is RequestStatus.WAITING:
                return request
            heapq.heappop(self._entries)
        return None

    def pop(self) -> Request:
        """Remove the request that `first` returned."""
        return heapq.heappop(self._entries)[1]

    def waiting(self) -> list[Request]:
        """All that wait, in no particular order."""
        return [r for _, r in self._entries if r.status is RequestStatus.WAITING]
