"""A group of processes that know each other by a store alone: where ranks meet before they have a communicator."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgspec
from torch.distributed import Store

from weight_sync.errors import SyncError, TransportError
from weight_sync.process_groups.calls import CallThread
from weight_sync.process_groups.rendezvous import (
    StoreServer,
    connect_store,
    count,
    drop,
    has,
    poll,
    put,
    take,
    under,
)
from weight_sync.time_left import left_s

from .frames import decode_bytes
from .place import Place

T = TypeVar("T")

_SWEEP_INTERVAL = 64
"""Broadcasts after which the ranks wait for each other once, so that their old keys can go."""
_FAREWELL_S = 2.0
"""How long the rank that serves the store waits, when it leaves, for the others to have read what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """What this rank has put into the store."""

    key: str
    """Where."""
    sequence: int | None
    """The collective that it belongs to; None: a message to one rank."""
    at: float
    """When, `time.monotonic()`."""


class StatelessProcessGroup(Place):
    """Barriers and small messages over a `TCPStore`; every rank calls the same methods in the same order.

    For the control plane: a message costs some hundred microseconds, and lies in the memory of the process that serves
    the store. Every call ends by its deadline with `DeadlineExceeded`, even when that process was stopped. After an
    error the group is of no more use. One thread at a time. A group that is collected leaves.
    """

    def __init__(
        self, name: str, rank: int, world_size: int, timeout_s: float, expiration_s: float
    ) -> None:
        super().__init__(rank, world_size)
        if not 0 <= rank < world_size:
            raise TransportError(
                f"cannot make group {name!r}: got rank {rank} and world size {world_size}, expected 0 <= rank < world "
                "size; check the launcher"
            )
        self.name = name
        """What errors call the group."""
        self.timeout_s = timeout_s
        """Deadline of a call that is given none."""
        self.store: Store
        """The group's own keys in the store."""
        self.address: str
        """Where the other ranks reach this machine."""
        self._server: StoreServer | None = None
        self._sequence = 0
        self._num_broadcasts = 0
        self._written: list[_Written] = []
        self._expiration_s = expiration_s
        self._num_sent: Counter[int] = Counter()
        self._num_received: Counter[int] = Counter()
        self._broken: str | None = None
        self._thread = CallThread(f"group-{name}")
        weakref.finalize(self, self._thread.let_go)

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        *,
        name: str,
        timeout_s: float = 60.0,
        served: bool = False,
        data_expiration_seconds: float = 3600.0,
    ) -> Self:
        """Meet the other ranks at `host:port`; returns when all have come.

        Rank 0 serves the store, unless `served` says that another process does (a launcher with a `StoreServer`: then
        the system can choose the port, and many groups share it under different names). A name is used once per store.
        What nobody has read after `data_expiration_seconds` may go.
        """
        group = cls(name, rank, world_size, timeout_s, data_expiration_seconds)
        end = time.monotonic() + timeout_s
        try:
            if rank == 0 and not served:
                group._server = StoreServer(host, port, timeout_s=timeout_s)
            group._call("joining", timeout_s, lambda: group._arrive(host, port, end))
            group.barrier(timeout_s=left_s(end))
        except BaseException:
            group.close()
            raise
        return group

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return when every rank has called it."""
        self.all_gather_bytes(b"", timeout_s=timeout_s)

    def broadcast_bytes(
        self, data: bytes | None = None, *, src: int = 0, timeout_s: float | None = None
    ) -> bytes:
        """`data` of rank `src`, on every rank. `src` does not wait for the others."""
        if self.rank == src and data is None:
            raise TransportError(
                f"group {self.name!r}: got nothing to broadcast on rank {src}, expected bytes; pass them"
            )
        self._num_broadcasts += 1
        if self._num_broadcasts % _SWEEP_INTERVAL == 0:
            self.barrier(timeout_s=timeout_s)

        def exchange(end: float) -> bytes:
            if self.rank == src and data is not None:
                self._write(data)
                return data
            return self._read([src], end)[0]

        return self._counted("a broadcast", timeout_s, exchange)

    def all_gather_bytes(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        """Every rank's `data`, in rank order, on every rank."""

        def exchange(end: float) -> list[bytes]:
            self._write(data)
            gathered = self._read(list(range(self.world_size)), end)
            self._sweep()
            return gathered

        return self._counted("an all_gather", timeout_s, exchange)

    def broadcast_obj(
        self,
        obj: Any = None,
        src: int = 0,
        *,
        type: Any = Any,
        timeout_s: float | None = None,
    ) -> Any:
        """The object of rank `src`, decoded on the others as `type`: anything that msgspec encodes, never pickled."""
        if self.rank == src:
            self.broadcast_bytes(msgspec.msgpack.encode(obj), src=src, timeout_s=timeout_s)
            return obj
        return decode_bytes(self.broadcast_bytes(src=src, timeout_s=timeout_s), type)

    def all_gather_obj(
        self, obj: Any, *, type: Any = Any, timeout_s: float | None = None
    ) -> list[Any]:
        """Every rank's object, in rank order, decoded as `type`; this rank's own as it is."""
        gathered = self.all_gather_bytes(msgspec.msgpack.encode(obj), timeout_s=timeout_s)
        return [
            obj if rank == self.rank else decode_bytes(data, type)
            for rank, data in enumerate(gathered)
        ]

    def send_obj(self, obj: Any, dst: int, *, timeout_s: float | None = None) -> None:
        """Leave an object for rank `dst`, which takes a sender's objects in their order; does not wait for it."""
        self._check_peer(dst)
        key = f"{self.rank}>{dst}/{self._num_sent[dst]}"
        self._num_sent[dst] += 1
        data = msgspec.msgpack.encode(obj)

        def leave() -> None:
            count(self.store, "sent")
            put(self.store, key, data)

        self.expire_data()
        self._call(
            f"a message to rank {dst}", self.timeout_s if timeout_s is None else timeout_s, leave
        )
        self._written.append(_Written(key=key, sequence=None, at=time.monotonic()))

    def recv_obj(self, src: int, *, type: Any = Any, timeout_s: float | None = None) -> Any:
        """The next object that rank `src` has left for this one, decoded as `type`; waits for it."""
        self._check_peer(src)
        key = f"{src}>{self.rank}/{self._num_received[src]}"
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        end = time.monotonic() + limit_s

        def fetch() -> bytes:
            poll(
                lambda: has(self.store, key) or None,
                end=end,
                abandoned=self._is_abandoned,
                late=lambda: (
                    f"group {self.name!r}, rank {self.rank}: got nothing from rank {src} by the deadline, expected a "
                    "message; look whether it lives"
                ),
            )
            data = take(self.store, key)
            drop(self.store, key)
            count(self.store, "taken")
            return data

        data = self._call(f"a message from rank {src}", limit_s, fetch)
        self._num_received[src] += 1
        return decode_bytes(data, type)

    def expire_data(self) -> None:
        """Forget what this rank has written and nobody has read for `data_expiration_seconds`."""
        limit = time.monotonic() - self._expiration_s
        old = [entry for entry in self._written if entry.at < limit]
        if old:
            self._written = [entry for entry in self._written if entry.at >= limit]
            self._call("forgetting", self.timeout_s, lambda: self._drop(old))

    def close(self) -> None:
        """Leave the group, and end the store if this rank serves it. Safe to repeat."""
        server, self._server = self._server, None
        if server is not None and self._broken is None:
            try:
                self._thread.run(self._await_readers, timeout_s=_FAREWELL_S, what="leaving")
            except SyncError:
                pass  # they had their time, or are gone
        self._broken = self._broken or "it was closed"
        self._thread.close()
        if server is not None:
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _arrive(self, host: str, port: int, end: float) -> None:
        if self._server is not None:
            store, self.address = self._server.store, self._server.host
        else:
            store, lifeline = connect_store(
                host, port, world_size=self.world_size, end=end, abandoned=self._is_abandoned
            )
            lifeline.close()
            self.address = lifeline.address
        self.store = under(store, f"{self.name}/group")
        if count(self.store, f"arrived/{self.rank}") > 1:
            raise TransportError(
                f"group {self.name!r}: got rank {self.rank} twice at this store, expected every rank once; give each "
                "group a name of its own"
            )

    def _call(self, what: str, timeout_s: float, call: Callable[[], T]) -> T:
        if self._broken is not None:
            raise TransportError(
                f"group {self.name!r}: got {what} after it broke ({self._broken}), expected none; make a new group"
            )
        try:
            return self._thread.run(
                call, timeout_s=timeout_s, what=f"group {self.name!r}, rank {self.rank}: {what}"
            )
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise

    def _counted(self, what: str, timeout_s: float | None, call: Callable[[float], T]) -> T:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        end = time.monotonic() + limit_s

        def counted() -> T:
            result = call(end)
            self._sequence += 1
            count(self.store, "finished")
            return result

        return self._call(what, limit_s, counted)

    def _write(self, data: bytes) -> None:
        key = f"{self._sequence}/{self.rank}"
        put(self.store, key, data)
        self._written.append(_Written(key=key, sequence=self._sequence, at=time.monotonic()))

    def _read(self, ranks: list[int], end: float) -> list[bytes]:
        keys = [f"{self._sequence}/{rank}" for rank in ranks]

        def late() -> str:
            missing = [
                rank for rank, key in zip(ranks, keys, strict=True) if not has(self.store, key)
            ]
            return (
                f"group {self.name!r}, rank {self.rank}: got nothing from ranks {missing} by the deadline, expected "
                "all to take part; look for one that is late, stopped or dead"
            )

        poll(
            lambda: has(self.store, *keys) or None,
            end=end,
            abandoned=self._is_abandoned,
            late=late,
        )
        return [take(self.store, key) for key in keys]

    def _sweep(self) -> None:
        """Every rank has come to this call, so what was written for earlier ones has been read."""
        old = [e for e in self._written if e.sequence is not None and e.sequence < self._sequence]
        self._written = [entry for entry in self._written if entry not in old]
        self._drop(old)

    def _drop(self, entries: list[_Written]) -> None:
        for entry in entries:
            drop(self.store, entry.key)

    def _await_readers(self) -> None:
        """Until every rank has finished as many calls as this one, and taken what was left for it."""

        def all_read() -> bool | None:
            finished = count(self.store, "finished", 0) >= self.world_size * self._sequence
            return (
                finished and count(self.store, "taken", 0) >= count(self.store, "sent", 0)
            ) or None

        poll(
            all_read,
            end=time.monotonic() + _FAREWELL_S,
            abandoned=self._is_abandoned,
            late=lambda: "some rank has not read the last messages",
        )

    def _check_peer(self, rank: int) -> None:
        if not 0 <= rank < self.world_size or rank == self.rank:
            raise TransportError(
                f"group {self.name!r}: rank {self.rank} got {rank} as the other end, expected another rank below "
                f"{self.world_size}; check the ranks"
            )

    def _is_abandoned(self) -> bool:
        return self._thread.over
