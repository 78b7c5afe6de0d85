"""Names in /dev/shm, as far as they can be what a test left behind."""

from __future__ import annotations

import os

OTHERS = ("torch_", "rollout-test-", ".org.chromium.", ".com.google.", "sem.")
"""How names begin that tests of other files make, which may run at the same time: torch's shared tensors, a browser."""


def shm_names() -> set[str]:
    """What is there now."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in names if not name.startswith(OTHERS)}
