"""An engine rank's end of an arena that travels, and the update groups that the rank has joined."""

from __future__ import annotations

from concurrent.futures import Future

import torch

from ..errors import TransportError
from ..plan.plan import Plan
from ..process_groups.receiving_process import ReceivingProcesses
from ..wire.messages import GroupHandle, JoinGroup, ProcessRef
from .joined_group import JoinedGroup
from .shadow_stage import ShadowStage, StageMemory


class OpenedGroupArena:
    """An engine rank's end: holds the memory of stages, not the arena's bytes. A publisher's own group goes with it."""

    def __init__(self, groups: GroupTable, handle: GroupHandle, memory: StageMemory) -> None:
        self._groups = groups
        self._group = groups.get(handle.group_name)
        self._num_bytes = handle.num_bytes
        self._owner = handle.owner
        self._ends_group = handle.ends_group
        self._memory: StageMemory | None = memory
        self.unstaged = memory.unstaged
        memory.hold()

    @property
    def owner(self) -> ProcessRef:
        return self._owner

    def stage(self, plan: Plan) -> ShadowStage:
        assert self._memory is not None, "the arena was closed"
        return ShadowStage(self._memory, self._group, self._num_bytes, plan)

    def refuse(self) -> None:
        self._group.destroy(wait_s=0.0)

    def given_up(self) -> bool:
        """This rank has left the group, as it is told to by who did not hear in time that the arena was opened, or has
        lost it."""
        left = self._groups.find(self._group.name) is not self._group
        return left or self._group.broken is not None

    def close(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.let_go()
        if self._ends_group:
            self._groups.drop(self._group)


class GroupTable:
    """The update groups of one engine rank, by name; a new one takes the place of an older one of its name."""

    def __init__(self, tp_rank: int, device: torch.device) -> None:
        self._tp_rank = tp_rank
        self._device = device
        self._groups: dict[str, JoinedGroup] = {}
        self._processes = ReceivingProcesses()

    def join(self, wanted: JoinGroup) -> Future[None]:
        """Join the trainer's group as rank `rank_offset` + tensor-parallel rank; done when all members have come."""
        old = self._groups.pop(wanted.group_name, None)
        if old is not None:
            old.destroy()
        group = JoinedGroup.join(
            master_address=wanted.master_address,
            master_port=wanted.master_port,
            rank=wanted.rank_offset + self._tp_rank,
            world_size=wanted.world_size,
            group_name=wanted.group_name,
            backend=wanted.backend,
            device=self._device if wanted.backend == "nccl" else "cpu",
            timeout_s=wanted.timeout_s,
            processes=self._processes,
        )
        self._groups[wanted.group_name] = group
        return group.joined

    def get(self, group_name: str) -> JoinedGroup:
        """The group of that name."""
        group = self._groups.get(group_name)
        if group is None:
            made = ", ".join(map(repr, sorted(self._groups))) or "none yet"
            raise TransportError(
                f"no update group {group_name!r}: expected one that was made ({made}); call init_weights_update_group "
                "first"
            )
        return group

    def find(self, group_name: str) -> JoinedGroup | None:
        """The group of that name, or None; from any thread."""
        return self._groups.get(group_name)

    def leave(self, group_name: str) -> None:
        """Leave a group; what its other members wait for fails."""
        self.get(group_name).destroy()
        del self._groups[group_name]

    def drop(self, group: JoinedGroup) -> None:
        """Leave this very group, which may have been left or replaced before."""
        if self._groups.get(group.name) is group:
            del self._groups[group.name]
        group.destroy()

    def __len__(self) -> int:
        return len(self._groups)

    def sweep(self) -> None:
        """Leave the groups of dead trainers. That of a plain one has its name until it is left or replaced."""
        for group in [group for group in self._groups.values() if group.orphaned]:
            group.destroy(wait_s=0.0)
            if group.peer_is_ours:
                del self._groups[group.name]

    def close(self) -> None:
        """Leave all groups."""
        while self._groups:
            self._groups.popitem()[1].destroy()
        self._processes.close()
