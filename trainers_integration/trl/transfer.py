"""`WeightTransfer(engine)`: how an `AsyncGRPOTrainer` brings its weights into an engine.

TRL's order: `init_weight_transfer`, then for every update `pause`, `send_weights`, `resume`, and `destroy` at the end.
The engine needs no pause: it goes on generating while an update is staged and commits it between two steps, so that
running completions go on with the new version, and each token says which one drew it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from rollout import Engine
from weight_sync import WeightPublisher

from .contract import check_engine, check_version


class WeightTransfer:
    """For `AsyncGRPOTrainer(weight_transfer=...)`; TRL calls every method, on rank 0."""

    def __init__(
        self,
        engine: Engine | str,
        *,
        publisher: WeightPublisher | None = None,
        pause: Literal["in_place", "retract"] | None = None,
        strict: bool = True,
    ) -> None:
        """engine: an `Engine`, a `RolloutPool`, a connected one, or an address.

        publisher: for options of its own; None: one that `destroy` closes. pause: let generation stand still while an
            update travels, with running requests frozen ("in_place") or computed anew by the new version ("retract");
            None: it goes on. strict: every parameter must come; TRL never sends those that do not require gradients, so
            a policy that is partly frozen needs False, and an engine that has loaded its checkpoint.
        """
        check_version()
        check_engine(engine)
        self._connected = isinstance(engine, str)
        self.engine: Engine = (
            Engine.connect(engine, skip_tokenizer_init=True) if isinstance(engine, str) else engine
        )
        self._given = publisher
        self._publisher: WeightPublisher | None = None
        self._pause: Literal["in_place", "retract"] | None = pause
        self._strict = strict
        self._num_sent = 0

    def init_weight_transfer(self) -> None:
        """Before the first update of a run."""
        limit = self.engine.config.request_timeout_s
        self._publisher = self._given or WeightPublisher(self.engine, timeout_s=limit)
        self._num_sent = 0

    def pause(self) -> None:
        """Before an update; generation stands still only where that was asked for."""
        if self._pause is not None:
            self.engine.pause_generation(self._pause)

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Publish what `iterator` yields as one version; returns when the engine serves it, verified.

        The iterator is exhausted in any case: other ranks of a sharded trainer wait in its gathers. Raises what
        `WeightPublisher.publish` raises, and then the engine serves the version that it did.
        """
        if self._publisher is None:
            self.init_weight_transfer()
        assert self._publisher is not None
        try:
            self._publisher.publish(
                iterator, label=f"update {self._num_sent + 1}", strict=self._strict
            )
            self._num_sent += 1
        except BaseException:
            self.resume()  # TRL does not, after an error
            raise
        finally:
            _exhaust(iterator)

    def resume(self) -> None:
        """After an update."""
        if self._pause is not None:
            self.engine.continue_generation()

    def destroy(self) -> None:
        """At the end of a run: closes what this object opened; the engine goes on."""
        if self._publisher is not None and self._given is None:
            self._publisher.close()
        self._publisher = None
        if self._connected:
            self.engine.shutdown()


def _exhaust(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass
