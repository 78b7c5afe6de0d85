"""What is made from the parameters follows every commit, and a commit whose derived state is wrong is undone."""

from __future__ import annotations

import pytest
import torch
from versions import version_weights

from rollout import Engine
from rollout.models.derived_state import DerivedState
from weight_sync.errors import WeightUpdateError


@pytest.fixture
def engine(tiny_checkpoint):
    options = {"keep_previous_weights": True, "kv_cache_bytes": 1 << 20}
    with Engine(tiny_checkpoint("llama"), skip_tokenizer_init=True, **options) as engine:
        yield engine


@pytest.fixture
def copied(engine):
    """A copy of the last norm, in another dtype, as a row of the engine's model; what it is made from, the copy, and
    how many of the next copies to spoil."""
    model = engine._executor._core.runner.model
    norm, copy, spoiled = model.norm.weight, torch.zeros(64, dtype=torch.float64), [0]

    def refresh():
        copy.copy_(norm)
        if spoiled[0]:
            spoiled[0] -= 1
            copy[0] += 1

    model.derived_state = (
        DerivedState(
            name="the last norm in float64",
            sources=("model.norm.weight",),
            refresh=refresh,
            check=lambda: (copy == norm).all(),
        ),
    )
    return norm, copy, spoiled


def test_derived_state_follows_each_commit_where_it_is(engine, copied, tiny_checkpoint):
    norm, copy, _ = copied
    address = copy.data_ptr()
    for number in (1, 2):
        moved = version_weights(tiny_checkpoint("llama"), number)
        engine.update_weights_from_tensor(moved)
        assert torch.equal(copy, moved["model.norm.weight"].double())
    assert copy.data_ptr() == address and torch.equal(copy, norm.double())


def test_a_commit_whose_derived_state_does_not_fit_is_rolled_back(engine, copied, tiny_checkpoint):
    norm, copy, spoiled = copied
    before = engine.weights_fingerprint()
    spoiled[0] = 1
    with pytest.raises(WeightUpdateError, match=r"the last norm in float64.*\n?.*restored"):
        engine.update_weights_from_tensor(version_weights(tiny_checkpoint("llama"), 1))
    assert engine.weights_fingerprint() == before
    assert torch.equal(copy, norm.double())
