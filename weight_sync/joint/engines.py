"""Several engines of one trainer as one target: one arena, one session, one vote.

All begin an update or none does; all have checked every byte before one of them is told to commit. From then on it is
decided: an engine that is late comes to the same commit when it goes on, whatever its trainer has been told by then.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec

from ..errors import EngineDiedError, ManifestMismatch, StaleVersionError
from ..wire.channel import Channel, RpcChannel
from ..wire.keys import shown
from ..wire.messages import Begin, BeginReply, EngineInfo, Hello
from .members import Member, same
from .service import JointChannel, JointService
from .session import PATIENCE_S

_LOOK_S = 0.25
"""How often a wait looks whether it is still wanted."""


class HasWeightChannel(Protocol):
    """An engine object, such as `rollout.Engine`."""

    def weight_channel(self) -> Channel:
        """A channel to its receiver; asked for again when the last one is dead."""


Target = str | HasWeightChannel


class JointEngines(JointService):
    """Several engines as one: what one of them refuses, none of them serves, and all get the same version."""

    commit_patience_s = PATIENCE_S
    what = "engines"

    def __init__(self, targets: Sequence[Target]) -> None:
        """Connect to all of them; raises what the first that cannot be reached says, and leaves nothing open."""
        self._channels: list[Channel] = []
        try:
            for target in targets:
                self._channels.append(_connect(target))
        except BaseException:
            for channel in self._channels:
                channel.close()
            raise
        members = [
            Member(name=_name(number, target), channel=channel)
            for number, (target, channel) in enumerate(zip(targets, self._channels, strict=True))
        ]
        super().__init__(members, name="engines")

    @property
    def closed(self) -> bool:
        """It takes no more calls, or one of the engines is dead."""
        return super().closed or any(channel.dead is not None for channel in self._channels)

    def close(self, *, wait: bool = True) -> None:
        super().close()
        for channel in self._channels:
            channel.close(wait=wait)

    def wait(self, future: Future[Any], timeout_s: float) -> Any:
        """As `JointService.wait`, and over when this is closed: an engine that hangs holds nobody up."""
        end = time.monotonic() + timeout_s
        while True:
            left_s = end - time.monotonic()
            with contextlib.suppress(TimeoutError):
                return future.result(max(0.0, min(left_s, _LOOK_S)))
            if future.done() or left_s <= _LOOK_S:
                return future.result(0.0)
            if super().closed:
                raise EngineDiedError("the publisher of these engines was closed")

    def _hello(self, message: Hello, end: float) -> EngineInfo:
        """They must be of one model; a restart of any of them is another engine."""
        infos = self._infos(message, end)
        first = infos[0]
        for member, info in zip(self._members, infos, strict=True):
            member.ranks = info.tp_size
            if info.manifest != first.manifest:
                raise ManifestMismatch(
                    f"engines differ: got {len(info.manifest.names)} tensors in {member.name} in another layout than "
                    f"in {self._members[0].name}, expected one model behind all of them; publish to each kind with a "
                    "publisher of its own"
                )
        ids = "/".join(info.engine_id for info in infos)
        alike = all(info.process.host == first.process.host for info in infos)
        return msgspec.structs.replace(
            first,
            engine_id=hashlib.sha256(ids.encode()).hexdigest(),
            version=max(info.version for info in infos),
            torn=next((info.torn for info in infos if info.torn is not None), None),
            tp_size=sum(member.ranks for member in self._members),
            process=first.process if alike else msgspec.structs.replace(first.process, host=""),
            transports=tuple(
                one for one in first.transports if all(one in info.transports for info in infos)
            ),
        )

    def _infos(self, message: Hello, end: float) -> list[EngineInfo]:
        answers = self._ask(same(self._members, message), end)
        answers.raise_loss()
        return [answers.replies[member] for member in self._members]

    def _begin(self, message: Begin, end: float) -> BeginReply:
        if not message.strict:
            self._check_alike(end)
        return super()._begin(message, end)

    def _check_alike(self, end: float) -> None:
        """A part of the tensors makes one version of engines that serve one version, and a mixture of others."""
        infos = self._infos(Hello(), end)
        if len({(info.version, info.torn is None) for info in infos}) > 1:
            shown = ", ".join(
                f"{member.name}: {info.version}{'' if info.torn is None else ' (not whole)'}"
                for member, info in zip(self._members, infos, strict=True)
            )
            raise StaleVersionError(
                f"the engines serve different versions: got {shown}, expected one for an update of a part; publish all "
                "tensors"
            )


class JointTarget:
    """Several engines where a publisher expects one; connects anew whenever it is asked."""

    def __init__(self, targets: Sequence[Target]) -> None:
        if not targets:
            raise ValueError("engines: got none, expected at least one engine or address")
        self._targets = [check_target(target) for target in targets]

    def weight_channel(self) -> Channel:
        """A channel to all of them; closing it closes the connections."""
        return JointChannel(JointEngines(self._targets), owned=True)


def check_target(target: Target) -> Target:
    """The same; `ValueError` for what can be no engine, before anything is packed for it."""
    if isinstance(target, str):
        if target.startswith(("http://", "https://")):
            raise ValueError(
                f"not an engine: got {shown(target)!r}, the URL of a server, expected the address of the engine behind "
                "it; start the server with --set engine.listen=ADDRESS, or update over HTTP (HttpServerEngineAdapter)"
            )
        if "://" not in target:
            raise ValueError(
                f"not an engine: got {shown(target)!r}, expected an engine, a pool, or its address such as "
                '"ipc:///tmp/folder/socket"; use engine.address'
            )
    elif not hasattr(target, "weight_channel"):
        raise ValueError(
            f"not an engine: got {type(target).__name__} {str(target)[:40]!r}, expected an engine, a pool, or its "
            "address; pass what Engine(...) returned, or its engine.address"
        )
    return target


def _connect(target: Target) -> Channel:
    return RpcChannel.connect(target) if isinstance(target, str) else target.weight_channel()


def _name(number: int, target: Target) -> str:
    return f"engine {number} ({shown(target)})" if isinstance(target, str) else f"engine {number}"
