"""NaN and infinite weights are refused, by name, whichever way they come, and finite ones never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sync_support import ToyEngine, one_by_one, weights

from weight_sync.errors import NonFiniteWeightsError, SessionError
from weight_sync.layout.finite import FiniteCheck, refuse_non_finite
from weight_sync.layout.manifest import Manifest, TensorMeta
from weight_sync.publisher.publisher import WeightPublisher

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


def spoil(tensor: torch.Tensor, where: float, value: float) -> None:
    flat = tensor.view(-1)
    flat[int(where * (flat.numel() - 1))] = value


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_exactly_the_tensors_that_are_not_finite_are_named(data: st.DataObject) -> None:
    metas = tuple(
        TensorMeta(
            name=f"t{i}",
            shape=data.draw(st.sampled_from([(), (0, 3), (5,), (3, 7), (300, 17)])),
            dtype=data.draw(st.sampled_from([*DTYPES, torch.int32])),
        )
        for i in range(data.draw(st.integers(1, 6)))
    )
    manifest = Manifest(tensors=metas, bucket_bytes=1 << 20)
    buffer = torch.full((manifest.arena_bytes,), 0xFF, dtype=torch.uint8)  # padding reads as NaN
    wrong = set()
    for i, meta in enumerate(metas):
        view = manifest.view(buffer, i)
        largest = data.draw(st.booleans())  # sums of these overflow
        number = torch.finfo(meta.dtype).max if meta.dtype.is_floating_point else 7
        view.fill_(number if largest else 1)
        if meta.dtype.is_floating_point and view.numel() and data.draw(st.booleans()):
            values = ["nan"] if meta.dtype is torch.float8_e4m3fn else ["nan", "inf", "-inf"]
            value = float(data.draw(st.sampled_from(values)))
            spoil(view, data.draw(st.floats(0, 1)), value)
            wrong.add(meta.name)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, len(metas) - 1)))), dtype=np.int64)
    wrong &= {metas[i].name for i in rows}
    check = FiniteCheck(manifest)
    if not wrong:
        check.check(buffer, rows)
        return
    with pytest.raises(NonFiniteWeightsError) as error:
        check.check(buffer, rows)
    assert {meta.name for meta in metas if f"  {meta.name}: " in str(error.value)} == wrong


@pytest.mark.parametrize("form", [dict, one_by_one])
def test_a_publish_is_refused_and_the_old_version_serves(
    engine: ToyEngine, form: Callable[..., Any]
) -> None:
    with WeightPublisher(engine, timeout_s=10.0) as publisher:
        publisher.publish(weights(1.0))
        tensors = weights(2.0)
        spoil(tensors["norm.weight"], 0.5, float("nan"))
        spoil(tensors["embed.weight"], 0.0, float("inf"))
        with pytest.raises(NonFiniteWeightsError, match="2 tensors are not finite") as error:
            publisher.publish(form(tensors))
        assert "norm.weight: 1 of 7 values" in str(error.value)
        assert "embed.weight: 1 of 384 values" in str(error.value)
        assert engine.values() == {1.0}
        assert publisher.publish(weights(3.0)).version == 2
        engine.host.look_away()
        assert publisher.publish(form(tensors), check_finite=False).version == 3


def test_values_that_a_cast_makes_infinite_are_refused(engine: ToyEngine) -> None:
    with WeightPublisher(engine, timeout_s=10.0) as publisher:
        tensors = weights(1.0, torch.float64)
        spoil(tensors["embed.weight"], 1.0, 1e300)  # finite here, not in bfloat16
        with pytest.raises(NonFiniteWeightsError, match=r"embed\.weight"):
            publisher.publish(tensors)


def test_a_session_is_refused_at_the_send(engine: ToyEngine) -> None:
    with WeightPublisher(engine, timeout_s=10.0) as publisher:
        publisher.begin(strict=False)
        publisher.send({"norm.weight": torch.ones(7, dtype=torch.bfloat16)})
        with pytest.raises(NonFiniteWeightsError):
            publisher.send({"layers.0.scale": torch.tensor(float("-inf"))})
        with pytest.raises(SessionError, match="failed earlier"):
            publisher.commit()
        assert engine.values() == {0.0}
        publisher.begin(strict=False, check_finite=False)
        engine.host.look_away()
        publisher.send({"layers.0.scale": torch.tensor(float("-inf"))})
        publisher.commit()


def test_more_tensors_than_anybody_reads_are_counted() -> None:
    tensors = {f"t{i}": torch.full((2,), float("nan")) for i in range(30)}
    with pytest.raises(NonFiniteWeightsError, match="30 tensors") as error:
        refuse_non_finite(tensors.items())
    assert "and 10 more" in str(error.value)
    refuse_non_finite([("counts", torch.tensor([1, 2])), ("nothing", torch.empty(0))])
