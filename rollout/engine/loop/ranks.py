"""How the ranks of one engine find each other, and the groups that they share.

tp        collectives of the layers, on the model's device
order     rank 0's ticks (`ticks`), on the CPU
weights   agreement on a weight update, on the CPU

They are separate because different threads use them. Every rank joins with the same `RankSpec` but for its number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import msgspec
import numpy as np
import torch

from weight_sync.errors import EngineDiedError
from weight_sync.layout.holdings import Holdings, joint_problems
from weight_sync.layout.manifest import mismatch
from weight_sync.layout.weight_map import WeightMap

from ...distributed.group_coordinator import GroupCoordinator
from ...distributed.stateless_process_group import StatelessProcessGroup
from ...errors import ConfigError
from ...models.model_config import ModelConfig
from ...protocol.tick_messages import Tick

HEARTBEAT_S = 10.0
"""Rank 0 sends a tick at least this often, so that the others can tell an idle engine from a dead one."""
FOLLOW_S = 60.0
"""How much longer than rank 0 another rank waits for a step boundary, because rank 0 decides whether it comes."""
SILENCE_S = 120.0
"""Silence after which a rank gives rank 0 up; a step, a load or a commit may take long."""


class RankSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's place among the ranks of an engine, and what its owner can spare it."""

    rank: int = 0
    """From 0; rank 0 talks to clients."""
    size: int = 1
    """Number of ranks."""
    store_host: str = ""
    """Host of the rendezvous; empty with one rank."""
    store_port: int = 0
    """Its port."""
    device: str | None = None
    """Device of this rank; None: as configured."""
    socket_folder: str = ""
    """Folder of whoever started the rank, where its socket files go; empty: see `bind`."""
    owner_folder: str = ""
    """A folder of its owner's, which the rank removes when the owner has died and cannot; empty: none."""
    model: ModelConfig | None = None
    """What its owner has read in the checkpoint's `config.json`; None: the rank reads it, with transformers, whose
    import takes a second of processor time."""

    def bind(self, name: str) -> str | None:
        """Address for a socket of this rank; None: the only rank of an engine may do as it likes."""
        if self.socket_folder:
            return f"ipc://{self.socket_folder}/{name}"
        # A rank that is killed removes no file, and its owner may be on another machine.
        return "tcp://127.0.0.1:0" if self.size > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroups:
    """The groups of one rank."""

    spec: RankSpec
    tp: GroupCoordinator
    order: GroupCoordinator
    weights: GroupCoordinator

    @classmethod
    def join(
        cls, spec: RankSpec, device: str, timeout_s: float, *, small_sums: bool = False
    ) -> Self:
        """Meet the other ranks; returns when all have come, or raises `DeadlineExceeded`.

        `small_sums`: see `GroupCoordinator.create`; of the group `tp`.
        """

        def group(name: str, on: str) -> GroupCoordinator:
            if spec.size == 1:
                return GroupCoordinator.single(device=on, name=name)
            meeting = StatelessProcessGroup.create(
                spec.store_host,
                spec.store_port,
                spec.rank,
                spec.size,
                name=name,
                timeout_s=timeout_s,
                served=True,
            )
            with contextlib.closing(meeting):
                return GroupCoordinator.create(
                    meeting,
                    device=on,
                    timeout_s=SILENCE_S,
                    small_sums=small_sums and name == "tp",
                    quick=name != "tp",
                )

        return cls(
            spec=spec,
            tp=group("tp", device),
            order=group("order", "cpu"),
            weights=group("weights", "cpu"),
        )

    def close(self) -> None:
        """Leave all groups; what the other ranks wait for then fails."""
        for group in (self.tp, self.order, self.weights):
            group.destroy()


@dataclass(frozen=True, slots=True)
class TickGroup:
    """Ticks over the group `order`."""

    group: GroupCoordinator

    def send(self, tick: Tick) -> None:
        """Rank 0: tell all other ranks."""
        if self.group.size > 1:
            self.group.broadcast_object(tick)

    def receive(self) -> Tick:
        """Another rank: wait for what rank 0 tells."""
        tick: Tick = self.group.broadcast_object(type=Tick, timeout_s=SILENCE_S)
        return tick


class GroupAgreement:
    """`weight_sync.receiver.agreement.RankAgreement` over the group `weights`.

    After a call that failed the ranks may be at different places, and the next result of one may be the last one's of
    another: all later calls fail, and `on_lost`, called once from the caller's thread, has to end the engine.
    """

    _TEXT_BYTES = 4096

    def __init__(
        self, group: GroupCoordinator, on_lost: Callable[[Exception], None] = lambda error: None
    ) -> None:
        self._group = group
        self._on_lost = on_lost
        self._lost: str | None = None
        self.rank = group.rank
        self.size = group.size

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Every rank's uint64 array of one shape, stacked in rank order, on every rank."""
        rows = self._gather(values.astype(np.uint64).tobytes())
        return np.stack([np.frombuffer(row, dtype=np.uint64).reshape(values.shape) for row in rows])

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in rank order, cut where it is very long."""
        rows = self._gather(text.encode()[: self._TEXT_BYTES].ljust(self._TEXT_BYTES, b"\0"))
        return [row.rstrip(b"\0").decode(errors="ignore") for row in rows]

    def _gather(self, data: bytes) -> list[bytes]:
        if self._lost is None:
            try:
                return self._group.all_gather_bytes(data)
            except Exception as error:
                self._lost = (
                    f"the ranks of the engine have lost each other over an update: rank {self.rank} got {error}; "
                    "start a new engine"
                )
                self._on_lost(EngineDiedError(self._lost))
        raise EngineDiedError(self._lost)


def check_whole_model(weight_map: WeightMap, group: GroupCoordinator) -> None:
    """`ManifestMismatch` on all ranks unless together they hold every element of every tensor; all call it at once."""
    mine = Holdings.of(weight_map)
    problems = None
    if group.rank == 0:
        others = [group.recv_object(other, type=Holdings) for other in range(1, group.size)]
        problems = joint_problems(weight_map.metas(), [mine, *others])
    else:
        group.send_object(mine, 0)
    problems = group.broadcast_object(problems, type=list[str])
    if problems:
        raise mismatch(
            f"the {group.size} ranks of this engine do not hold the model together",
            problems,
            "place each element on a rank, and overlapping parts alike on all that hold them",
        )


def device_of(spec: RankSpec, configured: str) -> str:
    """The device of a rank: its own where it was given one, else one GPU a rank, or the CPU.

    Raises `ConfigError` where there are fewer GPUs than ranks, or none of the configured number.
    """
    if spec.device is not None:
        return spec.device
    if configured == "auto":
        configured = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda:{spec.rank}" if configured == "cuda" else configured
    number, num_gpus = torch.device(device).index or 0, torch.cuda.device_count()
    if device.startswith("cuda") and not num_gpus:
        raise ConfigError(
            f"device: got {configured!r}, expected 'cpu': this process sees no GPU; look at CUDA_VISIBLE_DEVICES, and "
            "whether torch was built for CUDA"
        )
    if device.startswith("cuda") and number >= num_gpus:
        raise ConfigError(
            f"device: got {configured!r} for rank {spec.rank} of {spec.size}, expected at most {num_gpus} ranks, one "
            "for each GPU that this process sees; set device='cpu', a smaller tp_size, or CUDA_VISIBLE_DEVICES"
        )
    return device
