"""Promise 1 under load: whatever happens to twenty updates in a row, every token is of the one version it names."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from engine_faults import (
    PROMPT_SETS,
    FaultyEngine,
    Nursery,
    Stream,
    changed_fingerprints,
    check_spans,
)
from versions import Reference, version_weights

import weight_sync
from weight_sync import WeightPublisher
from weight_sync.errors import WeightUpdateError

KINDS = ("good", "good", "bad fingerprint", "aborted", "incomplete", "trainer killed")
NUM_UPDATES = 20


@pytest.mark.parametrize("tp_size", [1, 2])
def test_no_token_is_ever_of_a_mixture_during_twenty_random_updates(
    engine_of: Callable[..., FaultyEngine],
    nursery: Nursery,
    folder: Path,
    reference: Reference,
    tp_size: int,
) -> None:
    engine = engine_of(tp_size=tp_size)
    address, chosen = engine.engine.address, random.Random(tp_size)
    streams = [Stream(engine.engine, prompt) for prompt in PROMPT_SETS]
    with WeightPublisher(address) as publisher:
        for number in range(1, NUM_UPDATES + 1):
            kind = KINDS[number] if number < len(KINDS) else chosen.choice(KINDS)
            if kind == "trainer killed":
                commits = chosen.random() < 0.5
                trainer = nursery.trainer(
                    address, folder, number, commits=commits, label=f"v{number}"
                )
                if chosen.random() < 0.5:
                    trainer.says()
                trainer.kill()
                continue
            weights = version_weights(folder, number)
            label = f"v{number}"
            if kind == "good":
                publish_when_free(publisher, weights, label)
            elif kind == "bad fingerprint":
                with changed_fingerprints(), suppress(WeightUpdateError):
                    publisher.publish(weights, label=label)
                    raise AssertionError("a lie was believed")
            else:
                with suppress(WeightUpdateError):
                    publisher.begin(label=label)
                    publisher.send(dict(list(weights.items())[::2]))
                    if kind == "incomplete":
                        publisher.commit()
                        raise AssertionError("a part was taken for the whole")
                publisher.abort()
        publish_when_free(publisher, version_weights(folder, 99), "v99")
    seen: set[int] = set()
    for prompt, stream in zip(PROMPT_SETS, streams, strict=True):
        for result in stream.stop():
            seen.update(check_spans(prompt, result, reference))
    assert len(seen) > 3
    engine.serves(99)
    engine.holds_no_arena()


def publish_when_free(publisher: WeightPublisher, weights: object, label: str) -> None:
    """The session of a trainer that was killed just now may last for a moment."""
    for _ in range(50):
        with suppress(weight_sync.SessionBusy):
            publisher.publish(weights, label=label)  # type: ignore[arg-type]
            return
    raise AssertionError("the engine stays busy")
