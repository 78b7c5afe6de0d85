"""Importing our packages starts no thread, opens no socket, and loads nothing heavy until it is used."""

import json
import os
import subprocess
import sys

import pytest

LOOK = """
import json, os, sys, threading
def open_sockets():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    return [link for link in links if link.startswith(("socket:", "anon_inode:", "/memfd"))]
before = open_sockets()
import importlib
for name in %r:
    importlib.import_module(name)
print(json.dumps({
    "modules": sorted(sys.modules), "threads": threading.active_count(),
    "sockets": [link for link in open_sockets() if link not in before],
}))
"""

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "ray", "fastapi", "zmq"}


def look_after_importing(*modules: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", LOOK % (list(modules),)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "module",
    [
        *("rollout", "rollout.config", "rollout.errors", "rollout.settings"),
        *("rollout.scheduling", "rollout.cache", "rollout.cli", "rollout.cli.app"),
        *("weight_sync", "weight_sync.errors", "trainers_integration", "rollout_kernels"),
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module):
    seen = look_after_importing(module)
    assert HEAVY & set(seen["modules"]) == set()
    assert (seen["threads"], seen["sockets"]) == (1, [])


def test_importing_every_module_starts_nothing(sources):
    modules = [source.module for source in sources if not source.module.endswith("__main__")]
    seen = look_after_importing(*modules)
    assert set(modules) <= set(seen["modules"])
    assert (seen["threads"], seen["sockets"]) == (1, [])
