"""A trainer that stops in one phase of an update and waits there to be killed: address, phase, transport, device,
staging. "commit" is on its way then, and may never arrive; "committed" has been answered."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ipc_stand_in import PlainPatch, stand_in
from sync_support import weights

from weight_sync import WeightPublisher
from weight_sync.wire.messages import Commit


def main() -> None:
    torch.set_num_threads(1)
    address, phase, *rest = sys.argv[1:]
    transport, device = rest[:1], rest[1] if len(rest) > 1 else "cpu"
    staging = rest[2] if len(rest) > 2 else "extra"
    if transport and device == "cpu":
        stand_in(PlainPatch())
    publisher = WeightPublisher(
        address, transport=transport[0] if transport else "auto", staging=staging
    )
    publisher.begin()
    named = list(weights(2.0, device=device).items())
    if phase == "stage":
        publisher.send(named[:4])
    if phase in ("vote", "commit", "committed"):
        publisher.send(named)
    if phase in ("commit", "committed"):
        update = publisher._update
        assert update is not None
        commit = Commit(session_id=update.session_id, epoch=update.epoch, timeout_s=30.0)
        answer = update.channel.submit(commit, 30.0)
        if phase == "committed":
            answer.result(30.0)
    print("ready")
    time.sleep(60)


if __name__ == "__main__":
    main()
