"""Weight updates over HTTP; every refusal is 400 with `{"success": false, "message": ...}`."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from weight_sync.foreign.payload import read_serialized_named_tensors
from weight_sync.report import SyncReport
from weight_sync.wire.messages import KvPolicyName, VerifyMode

from .bodies import Body
from .payload import SharedMemory, TensorRecord, named_tensors
from .replies import HttpError, done, json_reply
from .routing import Ask, Route

Label = str | int
_MOST_NAMES = 20
"""Tensors that an error names."""


def _committed(ask: Ask, report: SyncReport) -> Response:
    """The answer of an update; a bucket of an open session is no update yet."""
    if not ask.state.engine.in_weight_update:
        ask.state.record.synced(report)
    return done(
        report.message,
        weight_version=report.label,
        weight_version_number=report.version,
        num_tensors=report.num_tensors,
        num_bytes=report.num_bytes,
        num_updated=report.updated,
        left=report.left,
        pause_s=report.pause_s,
        seconds=report.begin_to_verified_s,
    )


class BeginBody(Body):
    """Options of a session; `Engine.begin_weight_update` says what they mean."""

    weight_version: Label | None = None
    strict: bool = False
    flush_cache: bool = True
    kv_policy: KvPolicyName | None = None
    verify: VerifyMode = "pause"
    check_finite: bool = True


async def begin_weight_update(ask: Ask) -> Response:
    """Open a session: update calls stage, `/end_weight_update` commits all of them or none."""
    await ask.state.engine.async_begin_weight_update(**msgspec.structs.asdict(ask.body))
    return done("the session is open")


async def end_weight_update(ask: Ask) -> Response:
    """Commit the open session between two steps."""
    return _committed(ask, await ask.state.engine.async_end_weight_update())


async def abort_weight_update(ask: Ask) -> Response:
    """Forget the open session and all that was staged; no error if there is none."""
    await ask.state.engine.async_abort_weight_update()
    return done("nothing was changed")


class TensorBody(Body):
    """Tensors in the request: `tensors`, or with load_format "flattened_bucket" the bytes and metadata of a bucket."""

    tensors: list[TensorRecord] | None = None
    """In Hugging Face names, any subset of the model."""
    flattened_tensor: bytes | SharedMemory | None = None
    """The bucket's bytes."""
    metadata: list[dict[str, Any]] | None = None
    """Of each of its tensors: name, shape, dtype, start_idx, end_idx, numel."""
    serialized_named_tensors: list[str] | None = None
    """What trainers of the common dialect send: one pickle in base64 per rank, read without unpickling."""
    load_format: str | None = None
    flush_cache: bool = True
    weight_version: Label | None = None


async def update_weights_from_tensor(ask: Ask) -> Response:
    """Write tensors by name: a transaction of its own, or staged in an open session."""
    body: TensorBody = ask.body
    if body.serialized_named_tensors is None:
        tensors = await asyncio.to_thread(
            named_tensors, body.tensors, body.flattened_tensor, body.metadata
        )
    elif body.tensors is not None or body.flattened_tensor is not None:
        raise HttpError(400, "got serialized_named_tensors and tensors, expected one of the two")
    else:
        tensors = await asyncio.to_thread(
            read_serialized_named_tensors, body.serialized_named_tensors
        )
    report = await ask.state.engine.async_update_weights_from_tensor(
        tensors,
        load_format=None if body.load_format == "flattened_bucket" else body.load_format,
        flush_cache=body.flush_cache,
        weight_version=body.weight_version,
        **ask.extras,
    )
    return _committed(ask, report)


class GroupBody(Body):
    """A trainer's process group."""

    master_address: str
    master_port: int | str
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


async def init_weights_update_group(ask: Ask) -> Response:
    """Join a trainer's group, in which it is rank 0; answers when all members have come."""
    values = msgspec.structs.asdict(ask.body)
    port = str(values["master_port"])
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise HttpError(400, f"master_port: got {port[:60]!r}, expected 1 to 65535")
    await ask.state.engine.async_init_weights_update_group(**values)
    ask.state.groups.add(ask.body.group_name)
    return done(f"joined {ask.body.group_name}")


class GroupNameBody(Body):
    """Which group."""

    group_name: str | None = None
    """None: the only one that was joined."""


async def destroy_weights_update_group(ask: Ask) -> Response:
    """Leave a group."""
    name = _group(ask, ask.body.group_name)
    await ask.state.engine.async_destroy_weights_update_group(name)
    ask.state.groups.discard(name)
    return done(f"left {name}")


def _group(ask: Ask, name: str | None) -> str:
    """The group that is meant: older clients name it when they make it, and never again."""
    if name is not None:
        return name
    groups = ask.state.groups or {"weight_update_group"}
    if len(groups) > 1:
        raise HttpError(400, f"group_name: got none, expected one of {', '.join(sorted(groups))}")
    return next(iter(groups))


class DistributedBody(Body):
    """What the trainer broadcasts, in this order: lists, or one tensor's `name`, `dtype` and `shape`."""

    names: list[str] = msgspec.field(default_factory=list)
    dtypes: list[str] = msgspec.field(default_factory=list)
    shapes: list[list[int]] = msgspec.field(default_factory=list)
    name: str | None = None
    dtype: str | None = None
    shape: list[int] | None = None
    group_name: str | None = None
    """None: the only one that was joined."""
    flush_cache: bool = True
    weight_version: Label | None = None
    load_format: str | None = None
    fingerprint: int | None = None


async def update_weights_from_distributed(ask: Ask) -> Response:
    """Receive tensors that the trainer broadcasts now; send this before the broadcast, and do not wait for it."""
    values = msgspec.structs.asdict(ask.body)
    one = [values.pop(key) for key in ("name", "dtype", "shape")]
    if one != [None] * 3:
        if None in one or ask.body.names:
            raise HttpError(400, "expected names, dtypes and shapes, or one name, dtype and shape")
        values["names"], values["dtypes"], values["shapes"] = ([value] for value in one)
    values["group_name"] = _group(ask, ask.body.group_name)
    report = await ask.state.engine.async_update_weights_from_distributed(**values, **ask.extras)
    return _committed(ask, report)


class DiskBody(Body):
    """A folder on the engine's host."""

    model_path: str
    load_format: str | None = None
    flush_cache: bool = True
    weight_version: Label | None = None


async def update_weights_from_disk(ask: Ask) -> Response:
    """Load a safetensors folder of this host; on failure the old weights and the old path stay."""
    return await from_disk(ask, **msgspec.structs.asdict(ask.body), **ask.extras)


async def from_disk(ask: Ask, model_path: str, **options: Any) -> Response:
    """The answer of an update from a folder of this host."""
    report = await ask.state.engine.async_update_weights_from_disk(model_path, **options)
    return _committed(ask, report)


async def get_weight_version(ask: Ask) -> Response:
    """Label and number of the version that serves."""
    status = await ask.state.engine.async_status()
    return json_reply(
        {"weight_version": status.weight_version, "weight_version_number": status.version}
    )


class LabelBody(Body):
    """Another label."""

    new_version: Label
    abort_all_requests: bool = False
    """End everybody's requests first; else they go on, and their later tokens have the new label."""


async def update_weight_version(ask: Ask) -> Response:
    """Give the weights that serve another label; their number and bytes stay."""
    if ask.body.abort_all_requests:
        await ask.state.calls.abort_all()
    await ask.state.engine.async_update_weight_version(ask.body.new_version)
    label = str(ask.body.new_version)
    return done(f"the weights are called {label}", new_version=label)


class NameBody(Body):
    """A parameter."""

    name: str
    truncate_size: int = 100
    """Rows to return at most."""


async def get_weights_by_name(ask: Ask) -> Response:
    """The leading rows of a parameter, as nested lists of numbers."""
    if ask.body.truncate_size < 0:
        raise HttpError(400, f"truncate_size: got {ask.body.truncate_size}, expected 0 or more")
    return json_reply(
        await ask.state.engine.async_get_weights_by_name(ask.body.name, ask.body.truncate_size)
    )


async def weights_fingerprint(ask: Ask) -> Response:
    """64-bit fingerprint of the resident weights, as a number and in hexadecimal."""
    value = await ask.state.engine.async_weights_fingerprint()
    return json_reply({"fingerprint": value, "hex": f"{value:016x}"})


class CheckerBody(Body):
    """What to do."""

    action: Literal["snapshot", "reset", "reset_tensors", "compare", "checksum"] = "checksum"
    """"reset" and "reset_tensors" are the same."""


async def weights_checker(ask: Ask) -> Response:
    """Remember the fingerprints of all tensors, overwrite them with noise, compare with what was remembered, tell."""
    action, engine, state = ask.body.action, ask.state.engine, ask.state
    if action in ("reset", "reset_tensors"):
        num = await engine.async_reset_weights()
        return done(f"{num} parameters are noise; push a complete update", num_parameters=num)
    values = await engine.async_weights_checksums()
    if action == "snapshot":
        state.weights_snapshot = values
        return done(f"remembered {len(values)} tensors", num_tensors=len(values))
    if action == "compare":
        kept = state.weights_snapshot
        if kept is None:
            raise HttpError(400, "compare: got no snapshot, expected one; take it first")
        different = [name for name, value in values.items() if kept.get(name) != value]
        if different:
            raise HttpError(
                400,
                f"{len(different)} of {len(values)} tensors differ from the snapshot: "
                + ", ".join(different[:_MOST_NAMES])
                + (", ..." if len(different) > _MOST_NAMES else ""),
            )
        return done(f"all {len(values)} tensors are as in the snapshot", num_tensors=len(values))
    whole = await engine.async_weights_fingerprint()
    return done(
        "computed",
        fingerprint=whole,
        checksum=f"{whole:016x}",
        checksums={name: f"{value:016x}" for name, value in values.items()},
    )


_READ = ("GET", "POST")
ROUTES = (
    Route(
        path="/begin_weight_update",
        handler=begin_weight_update,
        body=BeginBody,
        update=True,
        admin=True,
    ),
    Route(path="/end_weight_update", handler=end_weight_update, update=True, admin=True),
    Route(path="/abort_weight_update", handler=abort_weight_update, update=True, admin=True),
    Route(
        path="/update_weights_from_tensor",
        handler=update_weights_from_tensor,
        body=TensorBody,
        hands_on=True,
        update=True,
        admin=True,
        statuses=(501,),
    ),
    Route(
        path="/init_weights_update_group",
        handler=init_weights_update_group,
        body=GroupBody,
        update=True,
        admin=True,
    ),
    Route(
        path="/destroy_weights_update_group",
        handler=destroy_weights_update_group,
        body=GroupNameBody,
        update=True,
        admin=True,
    ),
    Route(
        path="/update_weights_from_distributed",
        handler=update_weights_from_distributed,
        body=DistributedBody,
        hands_on=True,
        update=True,
        admin=True,
    ),
    Route(
        path="/update_weights_from_disk",
        handler=update_weights_from_disk,
        body=DiskBody,
        hands_on=True,
        update=True,
        admin=True,
    ),
    Route(path="/get_weight_version", handler=get_weight_version, methods=("GET",)),
    Route(path="/update_weight_version", handler=update_weight_version, body=LabelBody, admin=True),
    Route(
        path="/get_weights_by_name",
        handler=get_weights_by_name,
        methods=_READ,
        body=NameBody,
        admin=True,
    ),
    Route(path="/weights_fingerprint", handler=weights_fingerprint, methods=_READ, admin=True),
    Route(path="/weights_checker", handler=weights_checker, body=CheckerBody, admin=True),
)
