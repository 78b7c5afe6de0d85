"""Tensors that a plain `torch.distributed` trainer broadcasts: received whole, then checked, then staged.

Such a trainer says names, dtypes and shapes and then broadcasts, whatever the engine thinks of them. So everything is
received first, also what is refused afterwards: the group stays in step, and the trainer does not wait for ever.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import torch

from ..errors import FingerprintMismatch, ManifestMismatch, ProtocolError, SessionError
from ..layout.bucket import FlattenedTensorBucket, FlattenedTensorMetadata
from ..layout.fingerprints import fingerprint
from ..layout.finite import refuse_non_finite
from ..layout.manifest import Manifest, TensorMeta, align, mismatch, parse_dtype
from ..process_groups.expected import telling_bytes
from ..publisher.selection import Layout, Selector
from ..staging.joined_group import JoinedGroup
from ..staging.stage import Stage
from ..wire.messages import EngineInfo, Receive
from .session import Phase, Session

NamedTensor = tuple[str, torch.Tensor]

_MOST_BYTES_PER_ELEMENT = 16
"""Everything twice, under a fused name and under its parts, in float64."""
_SPARE_BYTES = 64 << 20
"""For names that have no memory here, such as rotary tables, beside a tiny model."""


@contextmanager
def left_on_error(group: JoinedGroup) -> Iterator[None]:
    """Bytes of the group may be under way that nobody takes: it cannot be used again."""
    try:
        yield
    except Exception:
        group.destroy(wait_s=0.0)
        raise


def check_can_receive(session: Session, canonical: Manifest) -> None:
    """`SessionError` or `ProtocolError` where tensors of a plain trainer have no place in the session."""
    if session.phase is not Phase.STAGING:
        raise SessionError(
            "tensors after the vote: expected Commit or Abort; send everything before the commit"
        )
    if session.manifest.tensors != canonical.tensors:
        raise ProtocolError(
            "Receive needs a session of the engine's own manifest: send the manifest of EngineInfo in Begin"
        )


def receive(
    group: JoinedGroup, message: Receive, timeout_s: float, session: Session
) -> list[NamedTensor]:
    """What the trainer broadcasts for `message`, in memory of the session's stage.

    `ManifestMismatch`, and nothing is received, for what cannot be a broadcast of this model's trainer;
    `ProtocolError` in a group of a publisher; `FingerprintMismatch` when the trainer has sent something else.
    """
    if group.peer_is_ours:
        raise ProtocolError(
            f"group {group.name!r}: got a call that takes undeclared tensors, expected a group of a plain "
            "torch.distributed trainer; send through the publisher whose group it is"
        )
    if not len(message.names) == len(message.dtypes) == len(message.shapes):
        raise ManifestMismatch(
            f"got {len(message.names)} names, {len(message.dtypes)} dtypes and {len(message.shapes)} shapes, expected "
            "as many of each"
        )
    metas = [
        TensorMeta(name=name, shape=tuple(shape), dtype=parse_dtype(dtype))
        for name, dtype, shape in zip(message.names, message.dtypes, message.shapes, strict=True)
    ]
    _check_sizes(metas, session.manifest)
    if message.layout == "tensors":
        tensors = _receive_tensors(group, metas, timeout_s, session.stage)
    else:
        aligned = message.layout == "bucket"
        tensors = _receive_bucket(group, metas, timeout_s, session.stage, aligned=aligned)
    if message.fingerprint is not None:
        _compare(tensors, message.fingerprint)
    return tensors


def _compare(tensors: Sequence[NamedTensor], declared: int) -> None:
    found = fingerprint(list(tensors))
    if found != declared:
        raise FingerprintMismatch(
            f"{len(tensors)} tensors over a group ({', '.join(name for name, _ in tensors[:3])}...): got fingerprint "
            f"{found:#018x}, expected {declared:#018x}; send each in the dtype, shape and order that were announced, "
            "and pass weight_sync.fingerprint of what is sent"
        )


def _check_sizes(metas: Sequence[TensorMeta], manifest: Manifest) -> None:
    """Memory is made for whatever is announced, also for what is refused afterwards: within reason."""
    negative = [str(meta) for meta in metas if min(meta.shape, default=0) < 0]
    if negative:
        raise mismatch("sizes below 0 were announced", negative, "expected 0 or more; send shapes")
    announced = sum(meta.num_bytes for meta in metas)
    elements = sum(meta.num_elements for meta in manifest.tensors)
    most = _MOST_BYTES_PER_ELEMENT * elements + _SPARE_BYTES
    if announced > most:
        raise ManifestMismatch(
            f"got {announced} bytes announced in one call, expected at most {most} for a model of {elements} "
            "elements; look at names, shapes and dtypes, or send several calls"
        )


def _receive_tensors(
    group: JoinedGroup, metas: Sequence[TensorMeta], timeout_s: float, stage: Stage
) -> list[NamedTensor]:
    spans, end = [], 0
    for meta in metas:
        spans.append((end, end + meta.num_bytes))
        end += align(meta.num_bytes)
    telling = [telling_bytes(meta.dtype) for meta in metas]

    def fill(incoming: torch.Tensor) -> Future[None]:
        return group.receive_into(incoming, spans, timeout_s=timeout_s, telling=telling)

    buffer = stage.receive(end, fill)
    return [
        (meta.name, buffer[start:stop].view(meta.dtype).view(meta.shape))
        for meta, (start, stop) in zip(metas, spans, strict=True)
    ]


def _receive_bucket(
    group: JoinedGroup,
    metas: Sequence[TensorMeta],
    timeout_s: float,
    stage: Stage,
    *,
    aligned: bool,
) -> list[NamedTensor]:
    metadata, end = [], 0
    for meta in metas:
        start, end = end, end + meta.num_bytes
        metadata.append(
            FlattenedTensorMetadata(
                name=meta.name,
                shape=torch.Size(meta.shape),
                dtype=meta.dtype,
                start_idx=start,
                end_idx=end,
                numel=meta.num_bytes,
            )
        )
        end = align(end) if aligned else end

    def fill(incoming: torch.Tensor) -> Future[None]:
        spans = [(0, end)] if end else []
        telling = [telling_bytes(meta.dtype) for meta in metas[-1:] if end]
        return group.receive_into(incoming, spans, timeout_s=timeout_s, telling=telling)

    buffer = stage.receive(end, fill)
    return FlattenedTensorBucket(flattened_tensor=buffer, metadata=metadata).reconstruct_tensors()


def stage_received(
    session: Session, info: EngineInfo, tensors: Sequence[NamedTensor]
) -> np.ndarray:
    """Take received tensors into the session's stage, cast to the engine's dtypes; their fingerprints, by row.

    `ManifestMismatch` lists every unknown, misshapen or doubled one; then nothing is staged.
    """
    layout = Layout(info, session.manifest.bucket_bytes)
    selector = Selector(layout, cast=True, packed=_nothing, ignored=lambda names: frozenset())
    selection = selector.take(tensors)
    selector.finish(strict=False)
    if session.request.check_finite:
        refuse_non_finite(tensors)
    return session.stage_trusted(selection.sources)


def _nothing(row: int) -> torch.Tensor:
    raise AssertionError("a selector of one call has no tensors of earlier ones")
