"""Faults of the sync use the toy engine of `tests/sync`; those of whole engines the fixtures of `engine_fixtures`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

_SYNC = Path(__file__).parent.parent / "sync"
sys.path.insert(0, str(_SYNC))
_spec = importlib.util.spec_from_file_location("sync_fixtures", _SYNC / "conftest.py")
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

sys.path.insert(0, str(Path(__file__).parent))
_engines = importlib.import_module("engine_fixtures")

_left = importlib.import_module("left_behind")
_toys = importlib.import_module("fleet_of_toys")

child = _module.child
engine = _module.engine
make_engine = _module.make_engine
breakpoints_end_with_their_module = _engines.breakpoints_end_with_their_module
engine_of = _engines.engine_of
folder = _engines.folder
fleet = _toys.three_toys
no_timer_or_thread_outlives_its_test = _left.no_timer_or_thread_outlives_its_test
nothing_outlives_its_module = _left.nothing_outlives_its_module
make_engine_with_faults = _engines.make_engine_with_faults
nursery = _engines.nursery
reference = _engines.reference
socket_folders = _engines.socket_folders
zygote = _engines.zygote
