"""The weight updates of `HttpServerEngineAdapter`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from weight_sync.layout.named_tensors import readable_pair
from weight_sync.report import SyncReport
from weight_sync.wire.cancellation import threaded

from ..engine.base import EngineBase
from .adapter_wire import packed, pairs, sync_report


class HttpWeightCalls(EngineBase):
    """What trainers do to the weights of an engine behind a server."""

    _bucket_bytes: int
    _in_session = False

    @abstractmethod
    def _get(self, path: str) -> Any:
        """The answer of a route."""

    @abstractmethod
    def _post(self, path: str, body: Mapping[str, Any], timeout_s: float | None = -1.0) -> Any:
        """The answer of a route to a body; timeout_s: -1, the adapter's own."""

    @abstractmethod
    def _send(self, method: str, path: str, **options: Any) -> Any:
        """The same, with options as of httpx."""

    def begin_weight_update(self, **options: Any) -> None:
        """Open an explicit session; options as of `Engine.begin_weight_update`."""
        self._post("/begin_weight_update", options)
        self._in_session = True

    def end_weight_update(self) -> SyncReport:
        """Commit the open session between two steps."""
        try:
            return sync_report(self._post("/end_weight_update", {}))
        finally:
            self._in_session = False

    def abort_weight_update(self) -> None:
        """Forget the open session; no error if there is none."""
        self._in_session = False
        self._post("/abort_weight_update", {})

    def update_weights_from_tensor(
        self,
        named_tensors: Any,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | int | None = None,
        **options: Any,
    ) -> SyncReport:
        """Write tensors by name; more than one bucket of them become one version all the same.

        named_tensors: (name, tensor) pairs, a mapping, a module, or with load_format="flattened_bucket" a
        `FlattenedTensorBucket`. They are copied to this process's memory first, wherever they are.
        """
        given = {"flush_cache": flush_cache, "weight_version": weight_version, **options}
        buckets = self._buckets(named_tensors)
        first = next(buckets, None) or packed([])
        second = next(buckets, None)
        if second is None:
            return sync_report(self._post_bucket({**first, **given}))
        if self._in_session:
            report = self._post_bucket({**first, **given})
            for bucket in (second, *buckets):
                report = self._post_bucket({**bucket, **given})
            return sync_report(report)
        self.begin_weight_update(flush_cache=flush_cache, weight_version=weight_version, **options)
        try:
            self._post_bucket(first)
            self._post_bucket(second)
            for bucket in buckets:
                self._post_bucket(bucket)
        except BaseException:
            self.abort_weight_update()
            raise
        return self.end_weight_update()

    def update_weights_from_disk(
        self, model_path: str | Path, load_format: str | None = None, **options: Any
    ) -> SyncReport:
        """Serve a folder's weights, a folder of the server's host."""
        body = {"model_path": str(model_path), "load_format": load_format, **options}
        return sync_report(self._post("/update_weights_from_disk", body))

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int | str,
        rank_offset: int,
        world_size: int,
        group_name: str = "weight_update_group",
        backend: str = "nccl",
    ) -> None:
        """Join a trainer's group; returns when all members have come."""
        body = {name: value for name, value in locals().items() if name != "self"}
        self._post("/init_weights_update_group", body)

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str | torch.dtype],
        shapes: Sequence[Sequence[int]],
        group_name: str = "weight_update_group",
        flush_cache: bool = True,
        weight_version: str | int | None = None,
        **options: Any,
    ) -> SyncReport:
        """Receive what the trainer broadcasts now; call it before the broadcast, without waiting for it."""
        body = {
            "names": list(names),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "flush_cache": flush_cache,
            "weight_version": weight_version,
            **options,
        }
        return sync_report(self._post("/update_weights_from_distributed", body))

    def destroy_weights_update_group(self, group_name: str = "weight_update_group") -> None:
        """Leave a group."""
        self._post("/destroy_weights_update_group", {"group_name": group_name})

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The leading rows of a parameter, as nested lists of float."""
        body = {"name": name, "truncate_size": truncate_size}
        values: list[Any] = self._post("/get_weights_by_name", body)
        return values

    def weights_fingerprint(self) -> int:
        """64-bit fingerprint of the resident weights."""
        value: int = self._get("/weights_fingerprint")["fingerprint"]
        return value

    def get_weight_version(self) -> str:
        """Label of the version that serves now."""
        label: str = self._get("/get_weight_version")["weight_version"]
        return label

    def update_weight_version(self, new_version: str | int) -> None:
        """Give the weights that serve another label."""
        self._post("/update_weight_version", {"new_version": new_version})

    def weights_checksums(self) -> dict[str, int]:
        """64-bit fingerprint of each resident tensor, by its Hugging Face name."""
        found = self._post("/weights_checker", {"action": "checksum"})["checksums"]
        return {name: int(value, 16) for name, value in found.items()}

    def reset_weights(self) -> int:
        """Overwrite all parameters with noise; returns how many."""
        num: int = self._post("/weights_checker", {"action": "reset"})["num_parameters"]
        return num

    @property
    def version(self) -> int:
        """Its number."""
        number: int = self._get("/get_weight_version")["weight_version_number"]
        return number

    async_begin_weight_update = threaded(begin_weight_update)
    async_end_weight_update = threaded(end_weight_update)
    async_abort_weight_update = threaded(abort_weight_update)
    async_update_weights_from_tensor = threaded(update_weights_from_tensor)
    async_update_weights_from_disk = threaded(update_weights_from_disk)
    async_init_weights_update_group = threaded(init_weights_update_group)
    async_update_weights_from_distributed = threaded(update_weights_from_distributed)
    async_destroy_weights_update_group = threaded(destroy_weights_update_group)
    async_get_weights_by_name = threaded(get_weights_by_name)
    async_weights_fingerprint = threaded(weights_fingerprint)
    async_get_weight_version = threaded(get_weight_version)
    async_update_weight_version = threaded(update_weight_version)
    async_weights_checksums = threaded(weights_checksums)
    async_reset_weights = threaded(reset_weights)

    def _post_bucket(self, body: dict[str, Any]) -> Any:
        return self._send(
            "POST",
            "/update_weights_from_tensor",
            content=msgspec.msgpack.encode(body),
            headers={"content-type": "application/msgpack"},
        )

    def _buckets(self, tensors: Any) -> Iterator[dict[str, Any]]:
        """Bodies of requests, each of tensors of at most `bucket_bytes` unless one alone is larger."""
        pending: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in map(readable_pair, pairs(tensors)):
            num_bytes = tensor.numel() * tensor.element_size()
            if pending and size + num_bytes > self._bucket_bytes:
                yield packed(pending)
                pending, size = [], 0
            # An iterator may reuse the memory of what it handed out.
            pending.append((name, tensor.detach().to("cpu", copy=True)))
            size += num_bytes
        if pending:
            yield packed(pending)
