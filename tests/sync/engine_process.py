"""A toy engine in a process of its own: where it listens ("-": anywhere), and the device of its weights.

Prints its address, then a line with its state for every line that it reads; "block" stops its loop first. The state is
what a step would find: it is looked at where steps are taken, never while an update is being written.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ipc_stand_in import PlainPatch, stand_in
from sync_support import ToyEngine

from weight_sync.staging import shadow


def main() -> None:
    torch.set_num_threads(1)
    bind, device = (*sys.argv[1:], "-", "cpu")[:2] if len(sys.argv) != 2 else (sys.argv[1], "cpu")
    memory = stand_in(PlainPatch()) if device == "cpu" else None
    shadow._SWAPPED_BYTES = 0  # what models of real size do
    engine = ToyEngine(serve=True, bind=None if bind == "-" else bind, device=device)
    print(engine.address)
    addresses = engine.addresses
    for line in sys.stdin:
        if line.strip() == "block":
            engine.host.blocked.set()
        state = state_of(engine) | {
            "moved": engine.addresses != addresses,
            "opened": memory.num_opened if memory is not None else 0,
            "still_open": len(engine.service._allocations),
            "threads": sorted(t.name for t in threading.enumerate() if "group" in t.name),
        }
        print(json.dumps(state))
    engine.close()


def state_of(engine: ToyEngine) -> dict[str, Any]:
    """What it serves at the next boundary between two steps; at once, if there will be none."""

    def look() -> dict[str, Any]:
        return {
            "version": engine.receiver.version,
            "values": sorted(engine.values()),
            "mixtures": list(engine.host.mixtures),
            "torn": engine.receiver.torn,
        }

    if engine.host.blocked.is_set():
        return look()
    found: dict[str, Any] = engine.host.between_steps(look, 30.0)
    return found


if __name__ == "__main__":
    main()
