"""A trainer that knows nothing of this package's groups, with the deadlines and futures of one that does."""

from __future__ import annotations

from typing import Any

from weight_sync.process_groups.backends import open_gloo
from weight_sync.process_groups.joining import RendezvousPlace
from weight_sync.process_groups.rendezvous import under
from weight_sync.time_left import left_s
from weight_sync.transports.trainer_group import TrainerGroup


class PlainGroup(TrainerGroup):
    """Rank 0 of a gloo group that is made under the keys of `torch.distributed`, and offers nothing else."""

    def _sit_as_trainer(self, server: Any, offer: Any, end: float) -> None:
        self._place = RendezvousPlace(
            store=server.store, address=server.host, lifeline=None, meeting=None
        )
        self._connection = open_gloo(
            under(server.store, self.name),
            rank=0,
            size=self.world_size,
            name=self.name,
            address=server.host,
            join_timeout_s=left_s(end),
            timeout_s=left_s(end),
        )
