"""Weights from a trainer into a running engine: both halves, their messages and their transports.

Trainers use `WeightPublisher`, or `FlattenedTensorBucket` as existing trainers do, and `fingerprint`;
engines give `WeightReceiver` a `WeightMap`. Importing this package imports none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        AddressInUseError,
        ConnectionLostError,
        DeadlineExceeded,
        EngineDiedError,
        FingerprintMismatch,
        ForkedProcessError,
        InsecureAddressError,
        ManifestMismatch,
        NonFiniteWeightsError,
        PayloadRefused,
        ProtocolError,
        RemoteError,
        SessionBusy,
        SessionError,
        StaleVersionError,
        SyncError,
        TornWeightsError,
        TrainerDiedError,
        TransportError,
        UnauthorizedError,
        WeightUpdateError,
    )
    from .foreign.payload import read_serialized_named_tensors
    from .layout.bucket import FlattenedTensorBucket, FlattenedTensorMetadata
    from .layout.fingerprints import fingerprint
    from .layout.manifest import Manifest, TensorMeta
    from .layout.tensor_sums import combine, tensor_fingerprint
    from .layout.weight_map import Placement, WeightMap
    from .plan.plan import Plan, compile_plan
    from .publisher.publisher import WeightPublisher
    from .receiver.receiver import WeightReceiver
    from .report import SyncReport
    from .spmd.mesh_update import close_mesh, update_weights
    from .spmd.publisher import SpmdPublisher
    from .transports.disk import read_checkpoint, write_checkpoint

_MODULES = {
    "layout.bucket": ("FlattenedTensorBucket", "FlattenedTensorMetadata"),
    "errors": (
        "AddressInUseError",
        "ConnectionLostError",
        "DeadlineExceeded",
        "EngineDiedError",
        "FingerprintMismatch",
        "ForkedProcessError",
        "InsecureAddressError",
        "ManifestMismatch",
        "NonFiniteWeightsError",
        "PayloadRefused",
        "ProtocolError",
        "RemoteError",
        "SessionBusy",
        "SessionError",
        "StaleVersionError",
        "SyncError",
        "TornWeightsError",
        "TrainerDiedError",
        "TransportError",
        "UnauthorizedError",
        "WeightUpdateError",
    ),
    "foreign.payload": ("read_serialized_named_tensors",),
    "layout.fingerprints": ("fingerprint",),
    "layout.tensor_sums": ("combine", "tensor_fingerprint"),
    "layout.manifest": ("Manifest", "TensorMeta"),
    "spmd.mesh_update": ("close_mesh", "update_weights"),
    "plan.plan": ("Plan", "compile_plan"),
    "publisher.publisher": ("WeightPublisher",),
    "receiver.receiver": ("WeightReceiver",),
    "report": ("SyncReport",),
    "spmd.publisher": ("SpmdPublisher",),
    "transports.disk": ("read_checkpoint", "write_checkpoint"),
    "layout.weight_map": ("Placement", "WeightMap"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AddressInUseError",
    "ConnectionLostError",
    "DeadlineExceeded",
    "EngineDiedError",
    "FingerprintMismatch",
    "FlattenedTensorBucket",
    "FlattenedTensorMetadata",
    "ForkedProcessError",
    "InsecureAddressError",
    "Manifest",
    "ManifestMismatch",
    "NonFiniteWeightsError",
    "PayloadRefused",
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
    "UnauthorizedError",
    "WeightMap",
    "WeightPublisher",
    "WeightReceiver",
    "WeightUpdateError",
    "close_mesh",
    "combine",
    "compile_plan",
    "fingerprint",
    "read_checkpoint",
    "read_serialized_named_tensors",
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
