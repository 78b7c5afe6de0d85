"""SkyRL's weights into our engines: a trainer engine for its workers in place of those that feed vLLM.

    self._weight_sync_engine = PublishingTrainerEngine(addresses, source, is_sender=rank == 0)

SkyRL 0.4 has one of these on every policy worker, calls `send_weights` on all of them at each sync, and generates over
HTTP. It names the interface in `weight_sync/weight_senders.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rollout.errors import ConfigError
from weight_sync.wire.messages import KvPolicyName

from .pushing import Pusher, checked_options, exhaust

BUCKET_BYTES = 512 << 20


class PublishingTrainerEngine:
    """Rank 0 publishes its source as one version to all `addresses`; the other ranks walk through theirs in step.

    `source` is a SkyRL `WeightSource`, or anything else that gives (name, tensor) pairs each time it is iterated;
    `publisher_options` go to `WeightPublisher`. Engines and pools are meant by their addresses (`Engine.address`).
    """

    skyrl_handles_prefix_cache_reset = True
    """Prefixes of older weights are never read here, so that the worker need not reset anything."""
    skyrl_force_disable_expandable_segments = False
    skyrl_empty_cache_after_send = True
    skyrl_draft_source = None
    client = None

    def __init__(
        self,
        addresses: Sequence[str],
        source: Iterable[tuple[str, torch.Tensor]] | None = None,
        *,
        is_sender: bool,
        bucket_bytes: int = BUCKET_BYTES,
        **publisher_options: Any,
    ) -> None:
        if isinstance(addresses, str) or not addresses:
            raise ConfigError(
                f"addresses: got {'one text' if addresses else 'none'}, expected a list with the address of at least "
                "one engine (Engine.address)"
            )
        self.source = source
        self.is_sender = is_sender
        self.version = 0
        """Syncs so far; the label of what was published last."""
        self._flush = False
        self._options = {
            "bucket_bytes": bucket_bytes,
            **checked_options(publisher_options, "PublishingTrainerEngine"),
        }
        self._addresses = list(addresses)
        self._pusher: Pusher | None = None

    def skyrl_set_reset_prefix_cache(self, reset: bool) -> None:
        """Whether requests that run compute their keys and values again with the next weights."""
        self._flush = bool(reset)

    def send_weights(self) -> None:
        """Publish on the sender; every rank's source is exhausted, also when the update is refused.

        Called on every rank, off the event loop. Raises what `WeightPublisher.publish` does, on the sender.
        """
        if self.source is None:
            raise ConfigError("send_weights: got no source, expected (name, tensor) pairs")
        if not self.is_sender:
            asyncio.run(exhaust(self.source))
        else:
            if self._pusher is None:
                self._pusher = Pusher(self._addresses, **self._options)
            policy: KvPolicyName = "flush" if self._flush else "keep"
            asyncio.run(self._pusher.push(self.source, self.version + 1, kv_policy=policy))
        self.version += 1

    def shutdown(self) -> None:
        """Let go of the engines; safe to call twice."""
        if self._pusher is not None:
            self._pusher.close()
            self._pusher = None
