"""The calls of `Engine` that concern weights; all of them drive a `WeightPublisher` of the caller's process."""

from __future__ import annotations

import difflib
import itertools
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weight_sync.errors import ManifestMismatch, SessionError, WeightUpdateError
from weight_sync.foreign.payload import read_serialized_named_tensors
from weight_sync.layout.bucket import as_bucket
from weight_sync.layout.named_tensors import NamedTensors, named_weights, pairs_of
from weight_sync.publisher.group_updates import GroupUpdates
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.publisher.sources import AnyNamedTensors
from weight_sync.report import SyncReport
from weight_sync.transports.disk import read_checkpoint
from weight_sync.wire.cancellation import threaded
from weight_sync.wire.channel import Channel
from weight_sync.wire.messages import MAX_LABEL_CHARS, KvPolicyName, SetLabel, VerifyMode

from ..errors import InvalidRequestError
from ..models.model_config import ModelConfig
from ..protocol.commands import (
    AbortRequests,
    Done,
    GetStatus,
    GetWeights,
    ResetWeights,
    SaveShardedModel,
    Status,
    WeightValues,
)
from ..tokenizer import is_unicode
from .client import EngineClient
from .twins import Asking, asks, awaitable

#: Keys that callers of the common dialect send, with the values that can be honoured: by doing nothing, but for
#: `abort_all_requests`, which ends what runs before the update.
HARMLESS = {
    "abort_all_requests": (None, False, True),
    "selector": (None,),
    "torch_empty_cache": (None, False, True),
    "keep_pause": (None, False),
    "is_async": (None, False),
    "pp_rank": (None, 0),
    "recapture_cuda_graph": (None, False),
}


class WeightCalls(EngineClient):
    """The part of `Engine` that takes new weights."""

    @cached_property
    def _publisher(self) -> WeightPublisher:
        publisher = WeightPublisher(self, timeout_s=self.config.request_timeout_s)
        return self.__dict__.setdefault("_publisher", publisher)  # one for all threads

    @cached_property
    def _group_updates(self) -> GroupUpdates:
        updates = GroupUpdates(self, timeout_s=self.config.request_timeout_s)
        return self.__dict__.setdefault("_group_updates", updates)

    def weight_channel(self) -> Channel:
        """How a `WeightPublisher` in this process reaches the engine."""
        return self._executor.weight_channel()

    def publish(self, named_tensors: NamedTensors, **options: Any) -> SyncReport:
        """Make these tensors the next version; arguments as of `WeightPublisher.publish`."""
        return self._publisher.publish(named_tensors, **options)

    async def async_publish(self, named_tensors: AnyNamedTensors, **options: Any) -> SyncReport:
        """As `publish`, awaitable; also takes asynchronous iterators."""
        return await self._publisher.async_publish(named_tensors, **options)

    @property
    def version(self) -> int:
        """Number of the version that serves now."""
        status: Status = self._call(GetStatus())
        return status.version

    @property
    def weight_version(self) -> str:
        """Its label."""
        return self.get_weight_version()

    def begin_weight_update(
        self,
        *,
        weight_version: str | int | None = None,
        strict: bool = False,
        flush_cache: bool = True,
        kv_policy: KvPolicyName | None = None,
        verify: VerifyMode = "pause",
        check_finite: bool = True,
    ) -> None:
        """Open an explicit session: update calls stage, `end_weight_update` commits all of them or none.

        With `strict` every parameter must be covered. Raises `SessionBusy` while another session is open.
        """
        self._publisher.begin(
            label=label_of(weight_version),
            strict=strict,
            kv_policy=policy_of(flush_cache, kv_policy),
            verify=verify,
            check_finite=check_finite,
        )

    async_begin_weight_update = threaded(begin_weight_update)

    @property
    def in_weight_update(self) -> bool:
        """An explicit session is open: update calls stage, and the end commits."""
        return self._publisher.in_session

    def end_weight_update(self) -> SyncReport:
        """Commit the open session between two steps; raises a `WeightUpdateError` and changes nothing on failure."""
        return self._publisher.commit()

    async_end_weight_update = threaded(end_weight_update)

    def abort_weight_update(self) -> None:
        """Forget the open session and all that was staged; no error if there is none."""
        self._group_updates.interrupt("the caller aborted the update")
        self._publisher.abort("the caller aborted the update")

    async_abort_weight_update = threaded(abort_weight_update)

    def update_weights_from_tensor(
        self,
        named_tensors: Any,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | int | None = None,
        *,
        kv_policy: KvPolicyName | None = None,
        strict: bool = False,
        check_finite: bool = True,
        **extras: Any,
    ) -> SyncReport:
        """Write tensors by name: a transaction of its own, or staged when an explicit session is open.

        named_tensors: (name, tensor) pairs, a mapping or a module, in Hugging Face names, any subset, any dtype (cast
            and reported); with load_format="flattened_bucket" a `FlattenedTensorBucket`, or a mapping with
            `flattened_tensor` and `metadata`; with "direct" the engine's own parameter names. Also what trainers of the
            common dialect serialize, one payload or a list with one for each rank, read without unpickling by
            `weight_sync.read_serialized_named_tensors`; and a request object of theirs, whose fields then count.
        flush_cache: drop cached prefixes and recompute running requests; False: `kv_policy` decides.
        weight_version: label of the new version.
        check_finite: refuse NaN and infinite values, `NonFiniteWeightsError` (in a session, its own option decides).

        Raises `ManifestMismatch` listing every unknown, misshapen or doubled tensor before anything is written, or when
        there is none at all outside a session, `PayloadRefused` for a payload of anything else, and other subclasses of
        `WeightUpdateError`; the old version then goes on serving.
        """
        self._home.check()  # before a payload is read, which is done once
        if hasattr(named_tensors, "serialized_named_tensors"):
            fields = request_fields(named_tensors)
            return self.update_weights_from_tensor(
                **fields, kv_policy=kv_policy, strict=strict, check_finite=check_finite
            )
        check_extras("update_weights_from_tensor", extras)
        tensors = _named_tensors(named_tensors, load_format)
        self._abort_if_asked(extras)
        if self._publisher.in_session:
            return self._publisher.send(tensors)
        return self._publisher.publish(
            _at_least_one(tensors),
            label=label_of(weight_version),
            strict=strict,
            kv_policy=policy_of(flush_cache, kv_policy),
            check_finite=check_finite,
        )

    async_update_weights_from_tensor = threaded(update_weights_from_tensor)

    def update_weights_from_disk(
        self,
        model_path: str | Path,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | int | None = None,
        *,
        kv_policy: KvPolicyName | None = None,
        check_finite: bool = True,
        **extras: Any,
    ) -> SyncReport:
        """Load a safetensors folder into the running engine; it must cover every parameter.

        Its files are those that transformers would take, and a `config.json` in it must describe the model that runs.
        A folder written by `weight_sync.write_checkpoint` is checked against its own fingerprints. On failure the old
        weights and the old path stay.
        """
        check_extras("update_weights_from_disk", extras)
        check_path("model_path", model_path)
        if load_format not in (None, "auto", "safetensors"):
            raise WeightUpdateError(
                f"load_format: got {load_format!r}, expected None, 'auto' or 'safetensors'"
            )
        if self._publisher.in_session:
            raise SessionError(
                "an explicit session is open: end or abort it before an update from disk"
            )
        try:
            _check_same_model(Path(self.config.model_path), Path(model_path))
            checkpoint = read_checkpoint(model_path)
        except OSError as error:  # A name that is too long, a folder that may not be read.
            raise WeightUpdateError(
                f"cannot read {str(model_path)[:200]!r}: {error.strerror}"
            ) from error
        self._abort_if_asked(extras)
        tensors = checkpoint.tensors
        report = self._publisher.publish(
            # All at once where nothing is read before they are packed: they are pages of the files.
            list(tensors) if checkpoint.fingerprints is None else tensors,
            label=label_of(weight_version) or checkpoint.label,
            kv_policy=policy_of(flush_cache, kv_policy),
            expected_fingerprints=checkpoint.fingerprints,
            check_finite=check_finite,
        )
        self.model_path = str(model_path)
        return report

    async_update_weights_from_disk = threaded(update_weights_from_disk)

    def _abort_if_asked(self, extras: Mapping[str, Any]) -> None:
        if extras.get("abort_all_requests"):
            self._call(AbortRequests(abort_all=True))

    @asks
    def get_weights_by_name(
        self, name: str, truncate_size: int = 100, timeout_s: float | None = None
    ) -> Asking[list[Any]]:
        """The leading `truncate_size` rows of a parameter, as nested lists of float; works on Hugging Face names."""
        answer: WeightValues = yield GetWeights(name=name, truncate_size=truncate_size)
        return _values(answer)

    async_get_weights_by_name = awaitable(get_weights_by_name)

    @asks
    def save_sharded_model(
        self, path: str | Path, pattern: str | None = None, max_size: int | None = None
    ) -> Asking[int]:
        """Write what serves now to a folder: each rank its own parameters as they lie in memory, on its host.

        `Engine(path, load_format="sharded_state", tp_size=...)` starts from it, with the same `tp_size` and dtype.
        pattern: file names, with `{rank}` and `{part}`. max_size: bytes of tensors in a file (5 GiB). A folder that has
        a saved state is refused. Generation waits meanwhile. Returns the number of files, all ranks together.
        """
        check_path("path", path)
        answer: Done = yield SaveShardedModel(
            path=str(Path(path).absolute()), pattern=pattern, max_size=max_size
        )
        return answer.count

    async_save_sharded_model = awaitable(save_sharded_model)

    def weights_fingerprint(self) -> int:
        """64-bit fingerprint of the resident weights; equals `weight_sync.fingerprint(...)` on the trainer's side."""
        return self._publisher.fingerprint()

    async_weights_fingerprint = threaded(weights_fingerprint)

    def weights_checksums(self) -> dict[str, int]:
        """64-bit fingerprint of each resident tensor, by its Hugging Face name."""
        return self._publisher.tensor_fingerprints()

    async_weights_checksums = threaded(weights_checksums)

    @asks
    def reset_weights(self) -> Asking[int]:
        """Overwrite all parameters with noise, as a test whether an update brings everything; returns how many.

        Running requests end; nothing is generated until a complete update has committed. `RolloutError` while an update
        is under way.
        """
        answer: Done = yield ResetWeights()
        return answer.count

    async_reset_weights = awaitable(reset_weights)

    def update_weight_version(self, new_version: str | int) -> None:
        """Give the weights that serve another label, from a step boundary on; their number and bytes stay.

        Requests that run go on, and their later tokens are a span with the new label.
        """
        label, limit = str(new_version), self.config.request_timeout_s
        if not 0 < len(label) <= MAX_LABEL_CHARS or not is_unicode(label):
            raise InvalidRequestError(
                f"new_version: got {len(label)} characters, expected 1 to {MAX_LABEL_CHARS}, whole ones"
            )
        message = SetLabel(label=label, nonce=secrets.token_hex(8), timeout_s=limit)
        self.weight_channel().call(message, limit)

    async_update_weight_version = threaded(update_weight_version)

    @asks
    def get_weight_version(self) -> Asking[str]:
        """Label of the version that serves now."""
        status: Status = yield GetStatus()
        return status.weight_version

    async_get_weight_version = awaitable(get_weight_version)


def _values(answer: WeightValues) -> list[Any]:
    values: list[Any] = np.frombuffer(answer.data, dtype="<f4").reshape(answer.shape).tolist()
    return values


def check_path(name: str, path: Any) -> None:
    """`InvalidRequestError` for what is no path of a folder."""
    if not isinstance(path, str | PathLike):
        raise InvalidRequestError(
            f"{name}: got {type(path).__name__}, expected the path of a folder"
        )


def _check_same_model(ours: Path, folder: Path) -> None:
    """`ManifestMismatch` where names and shapes may agree and the model is another one all the same."""
    if not (folder / "config.json").is_file() or not (ours / "config.json").is_file():
        return
    problems = ModelConfig.from_folder(ours).differences(ModelConfig.from_folder(folder))
    if problems:
        raise ManifestMismatch(
            f"cannot update from {folder}: its config.json describes another model: {'; '.join(problems)}; "
            "start a new engine for it"
        )


def label_of(weight_version: str | int | None) -> str | None:
    return None if weight_version is None else str(weight_version)


def policy_of(flush_cache: bool, kv_policy: KvPolicyName | None) -> KvPolicyName | None:
    """An explicit policy wins; `flush_cache=True` means "flush", False leaves it to the engine's configuration."""
    return kv_policy if kv_policy is not None else ("flush" if flush_cache else None)


def request_fields(request: Any) -> dict[str, Any]:
    """Arguments of `update_weights_from_tensor` from a request object of the common dialect."""
    names = ("load_format", "flush_cache", "weight_version", *HARMLESS)
    fields = {name: getattr(request, name) for name in names if hasattr(request, name)}
    return {"named_tensors": request.serialized_named_tensors, **fields}


def _is_serialized(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, bytes | str) for item in value)
    return isinstance(value, bytes | str)


def _named_tensors(named_tensors: Any, load_format: str | None) -> NamedTensors:
    if load_format in (None, "auto", "flattened_bucket") and _is_serialized(named_tensors):
        return read_serialized_named_tensors(named_tensors)
    if load_format == "flattened_bucket":
        bucket = as_bucket(named_tensors)
        if bucket is None:
            raise WeightUpdateError(
                f"named_tensors: got {type(named_tensors).__name__}, expected a FlattenedTensorBucket or a mapping "
                "with flattened_tensor and metadata, because load_format is 'flattened_bucket'"
            )
        return bucket.reconstruct_tensors()
    if load_format not in (None, "auto", "direct"):
        raise WeightUpdateError(
            f"load_format: got {load_format!r}, expected None, 'flattened_bucket' or 'direct'"
        )
    tensors: NamedTensors = named_tensors
    return tensors


def _at_least_one(tensors: NamedTensors) -> NamedTensors:
    """`tensors`, which may be an iterator, unless there are none: that would be a new version of the same weights."""
    if isinstance(tensors, torch.nn.Module):
        if next(iter(named_weights(tensors)), None) is None:
            raise no_tensors("update_weights_from_tensor")
        return tensors
    pairs = pairs_of(tensors)
    if isinstance(pairs, Sequence) and pairs:
        return pairs
    rest = iter(pairs)
    for first in rest:
        return itertools.chain((first,), rest)
    raise no_tensors("update_weights_from_tensor")


def no_tensors(call: str) -> ManifestMismatch:
    """The error of an update that brings nothing and is no part of a session."""
    return ManifestMismatch(
        f"{call}: got no tensors, expected at least one; the version stays as it is; leave the call out, or look for a "
        "filter that keeps nothing"
    )


def check_extras(call: str, extras: Mapping[str, Any]) -> None:
    for name, value in extras.items():
        if name not in HARMLESS:
            near = difflib.get_close_matches(
                name, (*HARMLESS, "flush_cache", "weight_version", "load_format"), n=1
            )
            raise TypeError(
                f"{call}: got an unknown argument {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if not any(value is allowed or value == allowed for allowed in HARMLESS[name]):
            raise WeightUpdateError(
                f"{call}: got {name}={value!r}, which this engine cannot honour; leave it out"
            )
