"""A toy engine in a process of its own. Prints its address, then a line with its state for every line that it reads."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ipc_stand_in import PlainPatch, stand_in
from sync_support import ToyEngine


def main() -> None:
    torch.set_num_threads(1)
    bind = sys.argv[1] if len(sys.argv) > 1 else None
    memory = stand_in(PlainPatch())
    engine = ToyEngine(serve=True, bind=bind)
    print(engine.address)
    addresses = engine.addresses
    for line in sys.stdin:
        if line.strip() == "block":
            engine.host.blocked.set()
        state = {
            "version": engine.receiver.version,
            "values": sorted(engine.values()),
            "mixtures": engine.host.mixtures,
            "moved": engine.addresses != addresses,
            "opened": memory.num_opened,
            "still_open": len(engine.service._allocations),
        }
        print(json.dumps(state))
    engine.close()


if __name__ == "__main__":
    main()
