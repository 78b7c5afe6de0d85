"""Stages that take less memory than a rank's weights once more for as long as a trainer is connected.

Each costs something else: see `WeightPublisher`'s `staging`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from ..layout.memory import Range, Storage
from ..layout.weight_map import WeightMap
from ..wire.messages import Staging
from .shadow import Shadow, ShadowWrite
from .shadow_stage import StageMemory


class KvCacheMemory(StageMemory):
    """What the KV cache has given back to the device, for one session at a time; given back before anybody is told
    that it is over."""

    def __init__(
        self,
        weight_map: WeightMap,
        device: torch.device,
        *,
        lend: Callable[[], None],
        take_back: Callable[[], None],
    ) -> None:
        """`lend()` raises while the KV cache has its memory, and keeps it from taking it again until `take_back()`."""
        super().__init__(weight_map, device)
        self._lend, self._take_back = lend, take_back
        self._lent = False

    def hold(self, *, sparing: bool = False) -> None:
        self._num_holders += 1

    def session_over(self) -> None:
        if not self._lent:
            return
        self._lent = False
        self.forget()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._take_back()

    def _existing_shadow(self) -> Shadow:
        if not self._lent:
            self._lend()
            self._lent = True
        try:
            return super()._existing_shadow()
        except BaseException:
            self.session_over()
            raise


class NoMemory(StageMemory):
    """None: checked chunks go straight into the parameters, which are nobody's version until the update is complete."""

    unstaged = True

    def __init__(
        self, weight_map: WeightMap, device: torch.device, *, tear: Callable[[], None]
    ) -> None:
        """`tear()` returns when nothing is generated any more, nor will be until a complete update has committed."""
        super().__init__(weight_map, device)
        self._tear = tear
        self._torn = False

    @property
    def shadow_bytes(self) -> int:
        return 0

    def before_move(self) -> None:
        if not self._torn:
            self._tear()
            self._torn = True

    def session_over(self) -> None:
        self._torn = False

    def _existing_shadow(self) -> Shadow:
        if self._shadow is None:
            self._shadow = _Parameters(self._weight_map)
        return self._shadow


class _Parameters(Shadow):
    """The parameters themselves, in the place of a second memory."""

    num_bytes = 0

    def __init__(self, weight_map: WeightMap) -> None:
        self._all = {key: list(ranges) for key, ranges in weight_map.occupied().items()}

    def occupied(self) -> dict[Storage, list[Range]]:
        return self._all

    def room(self, tensor: torch.Tensor, first: int, num_bytes: int) -> None:
        """Nothing arrives here before it was checked."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def write(self, tensors: Iterable[torch.Tensor]) -> ShadowWrite:
        """They are written already."""
        return _Written()


class _Written(ShadowWrite):
    """What was there before is nowhere."""

    reversible = False


class Lender(Protocol):
    """An engine, as far as its KV cache is concerned."""

    def lend_kv_cache(self) -> None: ...

    def return_kv_cache(self) -> None: ...


class StageMemories:
    """One of each kind, of one rank."""

    def __init__(
        self,
        weight_map: WeightMap,
        device: torch.device,
        lender: Lender,
        tear: Callable[[], None],
    ) -> None:
        self.extra = StageMemory(weight_map, device)
        """The one that most trainers use."""
        self._kv_cache = KvCacheMemory(
            weight_map, device, lend=lender.lend_kv_cache, take_back=lender.return_kv_cache
        )
        self._none = NoMemory(weight_map, device, tear=tear)

    def of(self, staging: Staging) -> StageMemory:
        """Where bytes wait by that choice."""
        if staging == "extra":
            return self.extra
        return self._kv_cache if staging == "kv_cache" else self._none

    def wait_with(self, wait: Callable[[Future[Any]], Any]) -> None:
        """How their thread waits; see `StageMemory.wait`."""
        for memory in (self.extra, self._kv_cache, self._none):
            memory.wait = wait
