"""What a process and a child that it starts need from each other, whatever the child does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

_START = (
    "import json, signal, sys; signal.pthread_sigmask(signal.SIG_SETMASK, ()); "
    "sys.path[:] = json.loads(sys.argv.pop()); from {} import main; sys.exit(main())"
)
"""What an owner blocks, such as one that has a thread for its signals, its children would never hear."""


def start_command(module: str, *arguments: str) -> list[str]:
    """The command line of a child that runs the `main()` of a module of ours, and finds what this process finds."""
    # -P: a working folder with a `random.py` of its own must not come first on the path.
    start = [sys.executable, "-P", "-c", _START.format(module)]
    return [*start, *arguments, json.dumps(_module_path())]


def _module_path() -> list[str]:
    """Where a child looks for modules: where this process does, but not in its working folder before all else.

    The folder of this package comes last where the working folder is the only way to it, as in a checkout.
    """
    ours = str(Path(__file__).resolve().parents[2])
    here = os.getcwd()
    path = [entry for entry in sys.path if entry and os.path.abspath(entry) != here]
    return path if ours in map(os.path.abspath, path) else [*path, ours]


def life_of(owner: int) -> list[int]:
    """In a child: a descriptor that is readable once `owner`, its parent, has ended; none where there is no such thing.

    The end of a pipe does not tell: a process that the owner has forked holds its other end as well. Ends this process
    at once when the owner is gone already.
    """
    try:
        life = [os.pidfd_open(owner)]
    except (AttributeError, OSError):
        return []
    if os.getppid() != owner:  # It ended before, and the number may be another process's.
        os._exit(0)
    return life


def readable(descriptors: Iterable[int], timeout_s: float | None = None) -> list[int]:
    """Those that have something to read, or have come to their end; waits for one, up to `timeout_s` seconds.

    `select.select` takes none from 1,024 on, and a process of many clients or files has those.
    """
    waits = select.poll()
    for descriptor in descriptors:
        waits.register(descriptor, select.POLLIN)
    found = waits.poll(None if timeout_s is None else 1e3 * max(0.0, timeout_s))
    return [descriptor for descriptor, _ in found]


def exit_words(code: int) -> str:
    """How a child ended, from what `subprocess` says of it."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code}, {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
