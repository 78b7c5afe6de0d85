"""A trainer over a group that stops in one phase of an update and waits there to be killed: address, phase, device."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from sync_support import weights

from weight_sync import WeightPublisher
from weight_sync.wire.deadline import Deadline
from weight_sync.wire.messages import Commit


def main() -> None:
    torch.set_num_threads(1)
    address, phase, device = sys.argv[1:]
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
    publisher = WeightPublisher(address, transport="process_group")
    publisher.publish(weights(1.0, device=device))
    publisher.begin()
    named = list(weights(2.0, device=device).items())
    update, packed = publisher._update, publisher._endpoint._packed
    assert update is not None and packed is not None
    if phase == "waiting in a kernel":
        # What announces the bytes is sent, and they are not.
        packed.arena.send = lambda spans, timeout_s: None  # type: ignore[method-assign]
        for rows in update.pack(update.selector.take(named)):
            update.announce(rows, Deadline(30.0))
    elif phase in ("vote", "commit"):
        publisher.send(named)
    if phase == "commit":
        commit = Commit(session_id=update.session_id, epoch=update.epoch, timeout_s=30.0)
        update.channel.submit(commit, 30.0)
        time.sleep(0.2)
    print("ready")
    time.sleep(120)


if __name__ == "__main__":
    main()
