"""The calls of `Engine` for weights that come over a process group, under the names that the field knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import torch

from weight_sync.errors import ManifestMismatch, WeightUpdateError
from weight_sync.publisher.group_updates import Announced, Backend, GroupLayout
from weight_sync.publisher.open_session import UpdateOptions
from weight_sync.report import SyncReport
from weight_sync.wire.cancellation import threaded
from weight_sync.wire.messages import KvPolicyName

from .weights import WeightCalls, check_extras, label_of, no_tensors, policy_of

BACKENDS: dict[str, Backend] = {"gloo": "gloo", "nccl": "nccl"}
GROUP_LAYOUTS: dict[str | None, GroupLayout] = {
    None: "tensors",
    "auto": "tensors",
    "flattened_bucket": "bucket",
    "packed_bucket": "packed_bucket",
}


class GroupWeightCalls(WeightCalls):
    """The part of `Engine` that takes new weights from a `torch.distributed` trainer."""

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int | str,
        rank_offset: int,
        world_size: int,
        group_name: str = "weight_update_group",
        backend: str = "nccl",
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Join a trainer's group: the trainer is rank 0, this engine's ranks are `rank_offset` + tp_rank.

        The trainer makes its side at the same time, as `torch.distributed` trainers do. Returns when all `world_size`
        members have come. Generation goes on meanwhile. A group of the same name is replaced. Raises
        `DeadlineExceeded`, which names who is missing, after `timeout_s` (None: `request_timeout_s`), or
        `TransportError`.
        """
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise WeightUpdateError(
                f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}; use gloo on a CPU"
            )
        try:
            port = int(master_port) if isinstance(master_port, str) else index(master_port)
        except (TypeError, ValueError, OverflowError):
            raise WeightUpdateError(
                f"master_port: got {str(master_port)[:60]!r}, expected a number from 1 to 65535"
            ) from None
        self._group_updates.join(
            group_name=group_name,
            master_address=master_address,
            master_port=port,
            rank_offset=rank_offset,
            world_size=world_size,
            backend=BACKENDS[backend],
            timeout_s=timeout_s,
        )

    async_init_weights_update_group = threaded(init_weights_update_group)

    def destroy_weights_update_group(self, group_name: str = "weight_update_group") -> None:
        """Leave a group; raises `TransportError` when there is none of that name."""
        self._group_updates.leave(group_name)

    async_destroy_weights_update_group = threaded(destroy_weights_update_group)

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str | torch.dtype],
        shapes: Sequence[Sequence[int]],
        group_name: str = "weight_update_group",
        flush_cache: bool = True,
        weight_version: str | int | None = None,
        load_format: str | None = None,
        *,
        kv_policy: KvPolicyName | None = None,
        check_finite: bool = True,
        fingerprint: int | None = None,
        **extras: Any,
    ) -> SyncReport:
        """Receive tensors that the trainer broadcasts now, one after the other, and make them the next version.

        Call it, without waiting, before the trainer broadcasts. In an explicit session it stages. load_format:
        "flattened_bucket" expects one broadcast of a `weight_sync.FlattenedTensorBucket`, "packed_bucket" one of a
        bucket without padding between its tensors. Whatever is wrong with names or shapes is raised after the bytes
        have come, so that the group stays in step; then nothing is written. A call that is refused before, because
        another update is under way for example, leaves the group: nobody may take its bytes for those of the next one.
        Calls of several threads take their turns in order. fingerprint: `weight_sync.fingerprint` of the tensors of
        this call in the trainer, as (name, tensor) in the dtypes that are sent; what came is compared with it before
        it is staged. Over NCCL nothing else proves that messages had the announced lengths.
        """
        if not names and load_format is None and not self._publisher.in_session:
            raise no_tensors("update_weights_from_distributed")  # Nobody broadcasts anything.
        with self._group_updates.taking(group_name) as taking:
            check_extras("update_weights_from_distributed", extras)
            if not isinstance(load_format, str | None) or load_format not in GROUP_LAYOUTS:
                raise WeightUpdateError(
                    f"load_format: got {load_format!r}, expected None, 'flattened_bucket' or 'packed_bucket'"
                )
            if not is_fingerprint(fingerprint):
                raise WeightUpdateError(
                    f"fingerprint: got {str(fingerprint)[:60]}, expected a number of 64 bits; pass "
                    "weight_sync.fingerprint of what is sent"
                )
            for name, column in (("names", names), ("dtypes", dtypes), ("shapes", shapes)):
                if isinstance(column, str) or not isinstance(column, Iterable):
                    raise ManifestMismatch(
                        f"{name}: got {type(column).__name__}, expected a list with an entry for each tensor"
                    )
            announced = Announced(
                names=names,
                dtypes=[str(dtype).removeprefix("torch.") for dtype in dtypes],
                shapes=shapes,
                layout=GROUP_LAYOUTS[load_format],
                fingerprint=fingerprint,
            )
            self._abort_if_asked(extras)
            with self._publisher.exclusive() as in_session:
                if in_session:
                    return self._publisher.stage(lambda update: taking.stage(update, announced))
                if not names:
                    raise no_tensors("update_weights_from_distributed")
                options = UpdateOptions(
                    label=label_of(weight_version),
                    strict=False,
                    kv_policy=policy_of(flush_cache, kv_policy),
                    check_finite=check_finite,
                )
                return taking.update(options, announced)

    async_update_weights_from_distributed = threaded(update_weights_from_distributed)


def is_fingerprint(value: Any) -> bool:
    """A number of 64 bits, of any library, or None."""
    try:
        return value is None or 0 <= index(value) < 1 << 64
    except TypeError:
        return False
