"""A trainer's stream of tensors into engines: every rank exhausts it, one rank publishes it."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from weight_sync import SyncReport, WeightPublisher
from weight_sync.wire.messages import KvPolicyName

Weights = Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]]

PUBLISH_TIMEOUT_S = 1800.0
"""A trainer gathers every tensor from all of its ranks while it is sent."""


async def exhaust(weights: Weights) -> None:
    """Walk through what is left: making each tensor is a collective of the trainer's ranks."""
    if isinstance(weights, AsyncIterable):
        async for _ in weights:
            pass
    else:
        for _ in weights:
            pass


@asynccontextmanager
async def exhausted_on_error(weights: Weights) -> AsyncIterator[Weights]:
    """The iterator of `weights`, which is walked to its end when the block raises: other ranks must not wait for it."""
    stream = aiter(weights) if isinstance(weights, AsyncIterable) else iter(weights)
    try:
        yield stream
    except BaseException:
        await exhaust(stream)
        raise


class Pusher:
    """Publishes stream after stream into the same engines, which all come to a version or none."""

    def __init__(
        self, addresses: Sequence[str], *, bucket_bytes: int, **publisher_options: Any
    ) -> None:
        options = {"timeout_s": PUBLISH_TIMEOUT_S, **publisher_options}
        self.addresses = list(addresses)
        self._publisher = WeightPublisher(self.addresses, bucket_bytes=bucket_bytes, **options)

    async def push(
        self, weights: Weights, global_steps: int | None, *, kv_policy: KvPolicyName = "flush"
    ) -> SyncReport:
        """Make the stream the next version, labelled with the trainer's step; it is exhausted also where that fails.

        A plain iterator is walked on this thread, where the trainer's collectives belong, so the event loop waits.
        """
        label = None if global_steps is None else str(global_steps)
        async with exhausted_on_error(weights) as stream:
            if isinstance(stream, AsyncIterable):
                return await self._publisher.async_publish(stream, label=label, kv_policy=kv_policy)
            return self._publisher.publish(_unclosed(stream), label=label, kv_policy=kv_policy)

    def close(self) -> None:
        """Give the arena back; safe to call twice."""
        self._publisher.close()


def _unclosed(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`, which whoever gives this up does not close: it is to be exhausted even then."""
    # `yield from` would close it.
    for item in weights:  # noqa: UP028
        yield item
