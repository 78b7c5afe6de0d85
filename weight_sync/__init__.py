"""Weights from a trainer into a running engine: both halves, their messages and their transports.

Trainers use `WeightPublisher`, or `FlattenedTensorBucket` as existing trainers do, and `fingerprint`;
engines give `WeightReceiver` a `WeightMap`. Importing this package imports none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bucket import FlattenedTensorBucket, FlattenedTensorMetadata
    from .errors import (
        DeadlineExceeded,
        EngineDiedError,
        FingerprintMismatch,
        ManifestMismatch,
        ProtocolError,
        RemoteError,
        SessionBusy,
        SessionError,
        StaleVersionError,
        SyncError,
        TornWeightsError,
        TrainerDiedError,
        TransportError,
        WeightUpdateError,
    )
    from .fingerprints import combine, fingerprint, tensor_fingerprint
    from .manifest import Manifest, TensorMeta
    from .mesh_update import close_mesh, update_weights
    from .plan import Plan, compile_plan
    from .publisher import WeightPublisher
    from .receiver import WeightReceiver
    from .report import SyncReport
    from .spmd_publisher import SpmdPublisher
    from .transports.disk import read_checkpoint, write_checkpoint
    from .weight_map import Placement, WeightMap

_MODULES = {
    "bucket": ("FlattenedTensorBucket", "FlattenedTensorMetadata"),
    "errors": (
        "DeadlineExceeded",
        "EngineDiedError",
        "FingerprintMismatch",
        "ManifestMismatch",
        "ProtocolError",
        "RemoteError",
        "SessionBusy",
        "SessionError",
        "StaleVersionError",
        "SyncError",
        "TornWeightsError",
        "TrainerDiedError",
        "TransportError",
        "WeightUpdateError",
    ),
    "fingerprints": ("combine", "fingerprint", "tensor_fingerprint"),
    "manifest": ("Manifest", "TensorMeta"),
    "mesh_update": ("close_mesh", "update_weights"),
    "plan": ("Plan", "compile_plan"),
    "publisher": ("WeightPublisher",),
    "receiver": ("WeightReceiver",),
    "report": ("SyncReport",),
    "spmd_publisher": ("SpmdPublisher",),
    "transports.disk": ("read_checkpoint", "write_checkpoint"),
    "weight_map": ("Placement", "WeightMap"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DeadlineExceeded",
    "EngineDiedError",
    "FingerprintMismatch",
    "FlattenedTensorBucket",
    "FlattenedTensorMetadata",
    "Manifest",
    "ManifestMismatch",
    "Placement",
    "Plan",
    "ProtocolError",
    "RemoteError",
    "SessionBusy",
    "SessionError",
    "SpmdPublisher",
    "StaleVersionError",
    "SyncError",
    "SyncReport",
    "TensorMeta",
    "TornWeightsError",
    "TrainerDiedError",
    "TransportError",
    "WeightMap",
    "WeightPublisher",
    "WeightReceiver",
    "WeightUpdateError",
    "close_mesh",
    "combine",
    "compile_plan",
    "fingerprint",
    "read_checkpoint",
    "tensor_fingerprint",
    "update_weights",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
