"""The trainer's parameters into the engine, from one rank or from many.

Every rank may hold an engine of its own, or all may share one: the first rank that holds an engine publishes into it.
Afterwards every rank knows how that went and which version its engine serves, so that a failure is an error on all
of them, and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from rollout import Engine
from rollout.errors import ConfigError, WeightUpdateError
from weight_sync import WeightPublisher

from .contract import check_engine, check_private

_TEXT_BYTES = 1024


class WeightSync:
    """A rank's engine, and the way of the trainer's weights into it. All ranks call all methods, in the same order."""

    def __init__(
        self, trainer: Any, engine: Engine | str | None, publisher: WeightPublisher | None = None
    ) -> None:
        """engine: an engine or a pool, its address, or None on ranks that use the one of rank 0.

        publisher: one with options of its own (another transport, for example), for a rank that publishes.
        """
        if engine is not None:
            check_engine(engine)
        self._trainer = trainer
        if self._is_sharded:
            check_private("sharded parameters")
        accelerator = trainer.accelerator
        own = engine if isinstance(engine, str) else "" if engine is None else engine.address
        addresses = _texts(accelerator, own)
        if not addresses[0]:
            raise ConfigError(
                "attach: got no engine on rank 0, expected one there; other ranks may give None and use it"
            )
        address = own or addresses[0]
        self._connected = not isinstance(engine, Engine)
        self.engine: Engine = (
            engine
            if isinstance(engine, Engine)
            else Engine.connect(address, skip_tokenizer_init=True)
        )
        owners = [text or addresses[0] for text in addresses]
        self._owners, self._address = owners, address
        self.publishes: bool = owners.index(address) == accelerator.process_index
        """This rank is the one that publishes into its engine."""
        self._given = publisher
        self._publisher: WeightPublisher | None = None
        self.version = 0
        """Number of the version that this trainer published last; 0: none."""

    @property
    def _is_sharded(self) -> bool:
        return bool(self._trainer._dist.is_fsdp or self._trainer._dist.is_zero3)

    def publish(self, label: str) -> None:
        """Make the engine serve the trainer's present parameters; returns when it does, on every rank."""
        failure: BaseException | None = None
        number = 0
        try:
            number = self._publish(label)
        except Exception as error:
            failure, number = error, -1
        numbers = self._all(number)
        if min(numbers) < 0 or failure is not None:
            rank = next((i for i, number in enumerate(numbers) if number < 0), 0)
            raise failure or WeightUpdateError(
                f"rank {rank} could not publish the weights of {label!r}; see its error"
            )
        self.version = numbers[self._owners.index(self._address)]

    def _publish(self, label: str) -> int:
        """The published version; 0 on a rank that does not publish."""
        tensors = self._tensors()
        try:
            if not self.publishes:
                return 0
            return self._opened().publish(tensors, label=label).version
        finally:
            _exhaust(tensors)  # Other ranks wait in the gathers of what is left.

    def _opened(self) -> WeightPublisher:
        """The publisher that was given, or one of this object's own."""
        if self._given is not None:
            return self._given
        if self._publisher is None:
            limit = self.engine.config.request_timeout_s
            self._publisher = WeightPublisher(self.engine, timeout_s=limit)
        return self._publisher

    def _all(self, number: int) -> list[int]:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return [number]
        value = torch.tensor([number], dtype=torch.int64, device=accelerator.device)
        return [int(n) for n in accelerator.gather(value).tolist()]

    def _tensors(self) -> Any:
        """What to publish: the module, where it holds whole parameters, else an iterator that gathers them."""
        trainer = self._trainer
        if not self._is_sharded:
            return trainer.accelerator.unwrap_model(trainer.model)
        return gathered(trainer)

    def release(self) -> None:
        """Give back what publishing took (its arena, its connection), which the next `publish` takes again.

        A publisher that was given stays as it is.
        """
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()

    def close(self) -> None:
        """`release`, and end the connection that was opened for an address; the engine goes on."""
        self.release()
        if self._connected:
            self.engine.shutdown()


def around_training(trainer: Any, *, begins: Callable[[], None], ends: Callable[[], None]) -> None:
    """Have `begins` and `ends` called whenever `trainer.train()` begins and ends.

    Weights may change there while `global_step` does not: another `train()`, the best model loaded.
    """
    from transformers import TrainerCallback

    class Around(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            begins()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            ends()

    trainer.add_callback(Around())


def gathered(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of a sharded model, one after the other, gathered by TRL's own iterators (FSDP, ZeRO-3, adapters
    merged); every rank must exhaust it."""
    from trl.generation.vllm_generation import VLLMGeneration

    class Walk(VLLMGeneration):  # for its iterators
        def _init_vllm(self) -> None:
            """No vLLM."""

    walk = Walk(trainer.model, trainer.accelerator, trainer.processing_class)
    named: Iterator[tuple[str, torch.Tensor]] = walk._iter_named_params()
    return named


def _exhaust(tensors: Any) -> None:
    if isinstance(tensors, Iterator):
        for _ in tensors:
            pass


def _texts(accelerator: Any, text: str) -> list[str]:
    """`text` of every rank; as numbers, because nothing that travels is unpickled here."""
    if accelerator.num_processes == 1:
        return [text]
    data = text.encode()
    if len(data) > _TEXT_BYTES:
        raise ConfigError(
            f"the engine's address is too long: got {len(data)} bytes, expected {_TEXT_BYTES}"
        )
    row = torch.zeros(1, _TEXT_BYTES, dtype=torch.uint8, device=accelerator.device)
    row[0, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    rows = accelerator.gather(row).tolist()
    return [bytes(values).rstrip(b"\0").decode() for values in rows]
