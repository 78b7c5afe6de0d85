"""A trainer's stream of tensors into engines: every rank exhausts it, one rank publishes it."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from rollout.errors import ConfigError
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


def checked_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`options` of `WeightPublisher`, from a configuration at `where`; `ConfigError` names those that it does not have.

    Whoever connects later calls this first: an unknown option is an error before training, and not at the first update.
    """
    known = list(inspect.signature(WeightPublisher).parameters)
    known = [name for name in known if name not in ("engine_or_address", "bucket_bytes")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"{where}: got {', '.join(unknown)}, expected options of WeightPublisher ({', '.join(known)}); leave them "
            "out"
        )
    return dict(options)


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
