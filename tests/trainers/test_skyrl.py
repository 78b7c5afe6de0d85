"""SkyRL's trainer engine: every rank exhausts its source, one publishes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import version_weights

from rollout import Engine
from rollout.errors import ConfigError, WeightUpdateError
from trainers_integration.skyrl import PublishingTrainerEngine


class Source:
    """As SkyRL's: the live model's tensors, made anew each time that it is walked."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.walked: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.walked = []
        for name, tensor in self.tensors.items():
            self.walked.append(name)
            yield name, tensor


def test_each_sync_is_one_version_and_every_rank_keeps_step(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("llama")
    options: dict[str, Any] = {"skip_tokenizer_init": True, "kv_cache_bytes": 1 << 20}
    with Engine(folder, **options) as one, Engine(folder, **options) as two:
        addresses = [one.address, two.address]
        sources = [Source({}), Source({})]
        ranks = [
            PublishingTrainerEngine(addresses, source, is_sender=i == 0, timeout_s=30.0)
            for i, source in enumerate(sources)
        ]
        for number in (1, 2):
            for source, rank in zip(sources, ranks, strict=True):
                source.tensors = version_weights(folder, number)
                rank.skyrl_set_reset_prefix_cache(number == 2)
                rank.send_weights()
                assert source.walked == list(source.tensors) and rank.version == number
            assert one.weight_version == two.weight_version == str(number)
            assert one.weights_fingerprint() == two.weights_fingerprint()

        for source in sources:
            source.tensors = {"model.nothing.weight": torch.ones(3), **version_weights(folder, 3)}
        with pytest.raises(WeightUpdateError, match=r"model\.nothing\.weight"):
            ranks[0].send_weights()
        ranks[1].send_weights()
        assert all(source.walked == list(source.tensors) for source in sources)
        assert one.weight_version == two.weight_version == "2" and ranks[0].version == 2
        for rank in ranks:
            rank.shutdown()
            rank.shutdown()


@pytest.mark.parametrize("addresses", [[], "tcp://127.0.0.1:1"])
def test_addresses_are_a_list_of_at_least_one(addresses: Any) -> None:
    with pytest.raises(ConfigError, match="addresses"):
        PublishingTrainerEngine(addresses, is_sender=True)


def test_an_option_that_nobody_knows_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="got timeout, expected options of WeightPublisher"):
        PublishingTrainerEngine(["tcp://127.0.0.1:1"], is_sender=False, timeout=3)


def test_a_source_is_needed() -> None:
    with pytest.raises(ConfigError, match="source"):
        PublishingTrainerEngine(["tcp://127.0.0.1:1"], is_sender=True).send_weights()
