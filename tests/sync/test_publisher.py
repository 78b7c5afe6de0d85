"""What a trainer may send, what is refused, and what the report says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from sync_support import ALIAS, FUSED, ToyEngine, one_by_one, toy_shapes, weights
from torch import nn

import weight_sync
from weight_sync import ManifestMismatch, SessionError, StaleVersionError, WeightPublisher
from weight_sync.layout.manifest import WireManifest
from weight_sync.publisher.selection import Layout, Selector
from weight_sync.wire.messages import EngineInfo
from weight_sync.wire.process import current_process

NUM_TENSORS = len(toy_shapes())


@pytest.fixture
def publisher(engine: ToyEngine) -> WeightPublisher:
    return WeightPublisher(engine, timeout_s=10)


def noise(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in toy_shapes().items()
    }


def resident(engine: ToyEngine) -> dict[str, torch.Tensor]:
    return {name: engine.weight_map.read(name) for name in toy_shapes()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "form", [dict, lambda d: list(d.items()), lambda d: tuple(d.items()), one_by_one]
)
def test_a_mapping_pairs_and_a_one_shot_iterator_all_arrive_bit_for_bit(
    engine: ToyEngine, form: Callable[..., Any]
) -> None:
    engine.host.looks = False
    tensors = noise()
    with WeightPublisher(engine) as publisher:
        report = publisher.publish(form(tensors))
        assert same(resident(engine), tensors)
        assert report.fingerprint == weight_sync.fingerprint(tensors) == publisher.fingerprint()


def test_a_module_is_sent_with_its_parameters_and_its_tied_head_once(
    make_engine: Callable[..., ToyEngine],
) -> None:
    from weight_sync.layout.weight_map import Placement, WeightMap
    from weight_sync.receiver.local_channel import LocalChannel
    from weight_sync.receiver.receiver import WeightReceiver
    from weight_sync.receiver.service import WeightService

    def build() -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "lm_head": nn.Linear(4, 8, bias=False)})
        model["lm_head"].weight = model["embed"].weight
        return model

    trainer = build()
    memory = torch.zeros(8, 4)
    engine = make_engine()
    receiver = WeightReceiver(
        WeightMap(
            [Placement.whole("embed.weight", memory)],
            {"embed.weight": memory},
            aliases={"lm_head.weight": "embed.weight"},
        ),
        engine.host,
    )
    service = WeightService(receiver)
    engine.weight_channel = lambda: LocalChannel(service)  # type: ignore[method-assign]
    with WeightPublisher(engine) as publisher:
        report = publisher.publish(trainer)
        assert torch.equal(memory, trainer["embed"].weight)
        assert report.fingerprint == weight_sync.fingerprint(trainer)
        state = trainer.state_dict()
        assert set(state) == {"embed.weight", "lm_head.weight"}
        assert publisher.publish(state).updated == 1
    service.close()


def test_a_report_counts_and_unpacks_and_a_label_defaults_to_the_version(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    report = publisher.publish(weights(1.0), label="step 1")
    success, message = report
    assert success is True and "version 1" in message
    assert (report.version, report.label) == (1, "step 1")
    assert (report.num_tensors, report.updated, report.left) == (NUM_TENSORS, NUM_TENSORS, ())
    assert report.num_bytes == sum(t.nbytes for t in weights(1.0).values())
    assert publisher.publish(weights(2.0)).label == "2"
    assert engine.host.events == [("written", 1, "step 1", None), ("written", 2, "2", None)]


def test_timings_are_measured_and_ordered(publisher: WeightPublisher) -> None:
    publisher.publish(weights(1.0))
    report = publisher.publish(weights(2.0))
    assert 0 < report.pack_s
    assert 0 < report.copy_s + report.verify_s <= report.pause_s
    assert report.stage_s < report.begin_to_committed_s < report.begin_to_verified_s < 5


def test_casting_is_exact_and_reported(engine: ToyEngine, publisher: WeightPublisher) -> None:
    report = publisher.publish(weights(1.5, torch.float64))
    assert engine.values() == {1.5}
    assert len(report.casts) == NUM_TENSORS
    assert ("embed.weight", "float64", "bfloat16") in report.casts
    held = {name: dtype for name, (_, dtype) in toy_shapes().items()}
    assert report.fingerprint == weight_sync.fingerprint(weights(1.5, torch.float64), dtypes=held)
    with pytest.raises(
        ManifestMismatch, match=r"embed.weight: got float64, expected bfloat16.*cast=True"
    ):
        publisher.publish(weights(2.0, torch.float64), cast=False)


@pytest.mark.parametrize(
    ("got", "held"), [("bfloat16", "float8_e4m3fn"), ("float8_e5m2", "bfloat16")]
)
def test_a_cast_to_or_from_a_quantised_dtype_without_its_scale_is_refused(
    got: str, held: str
) -> None:
    info = EngineInfo(
        protocol=1,
        process=current_process(),
        engine_id="e",
        version=0,
        label=None,
        torn=None,
        aliases={},
        fused={},
        device="cpu",
        tp_size=1,
        manifest=WireManifest(names=("w",), shapes=((2,),), dtypes=(held,), bucket_bytes=256),
        transports=(),
    )
    layout = Layout(info, 256)
    selector = Selector(layout, cast=True, packed=lambda i: torch.empty(0), ignored=frozenset)
    selector.take([("w", torch.ones(2).to(getattr(torch, got)))])
    with pytest.raises(ManifestMismatch, match=f"w: got {got}, expected {held}; .*scale"):
        selector.finish(strict=True)
    selector = Selector(layout, cast=True, packed=lambda i: torch.empty(0), ignored=frozenset)
    assert selector.take([("w", torch.ones(2).to(getattr(torch, held)))]).casts == []
    selector.finish(strict=True)


def test_integers_are_never_cast_to_weights(publisher: WeightPublisher) -> None:
    with pytest.raises(ManifestMismatch, match=r"norm.weight: got int64, expected bfloat16"):
        publisher.publish(weights(1.0) | {"norm.weight": torch.ones(7, dtype=torch.int64)})


def test_every_problem_is_listed_in_one_error_and_nothing_is_opened(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    tensors = weights(1.0)
    del tensors["norm.weight"]
    tensors["layers.0.k.weight"] = torch.zeros(9, 16, dtype=torch.bfloat16)
    pairs = [*tensors.items(), ("embed.weight", tensors["embed.weight"])]
    pairs += [("embed.wieght", torch.zeros(1)), ("model.layers.0.q.weight", torch.zeros(1))]
    with pytest.raises(ManifestMismatch) as caught:
        publisher.publish(pairs)
    text = str(caught.value)
    for part in (
        "norm.weight bfloat16 [7]: missing",
        "layers.0.k.weight: got shape [9, 16], expected [8, 16]",
        "embed.weight: sent more than once",
        "embed.wieght: unknown to the engine; did you mean embed.weight?",
        "model.layers.0.q.weight: unknown to the engine; did you mean layers.0.q.weight?",
    ):
        assert part in text
    assert engine.values() == {0.0} and engine.receiver.version == 0
    assert engine.receiver._epoch == 0
    assert publisher.publish(weights(3.0)).version == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"norm.weight": torch.zeros(8, dtype=torch.bfloat16)}, r"got shape \[8\], expected \[7\]"),
        ({"norm.weight": torch.zeros(7, dtype=torch.int64)}, "got int64, expected bfloat16"),
        ({"norm.weight": torch.zeros(7, dtype=torch.bfloat16, device="meta")}, "without data"),
        ({"norm.weight": torch.zeros(7, dtype=torch.bfloat16).to_sparse()}, "sparse_coo"),
        ({"norm.weight": [0.0] * 7}, "not a named tensor"),
        ({"other.weight": torch.zeros(7)}, "other.weight: unknown to the engine"),
    ],
)
def test_what_was_right_the_last_time_is_looked_at_again(
    engine: ToyEngine, publisher: WeightPublisher, change: dict[str, Any], problem: str
) -> None:
    for value in (1.0, 2.0):
        publisher.publish(dict(reversed(weights(value).items())))
        assert engine.values() == {value}
    with pytest.raises(ManifestMismatch, match=problem):
        publisher.publish(dict(reversed(weights(3.0).items())) | change)
    assert engine.values() == {2.0}
    report = publisher.publish(dict(reversed(weights(4.0, torch.float32).items())))
    assert engine.values() == {4.0} and len(report.casts) == 7


def test_an_iterator_with_problems_is_read_to_its_end_and_changes_nothing(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    seen = []

    def tensors() -> Any:
        for name, tensor in (("unknown.weight", torch.zeros(3)), *weights(1.0).items()):
            seen.append(name)
            yield name, tensor

    with pytest.raises(ManifestMismatch, match=r"unknown.weight: unknown"):
        publisher.publish(tensors())
    assert len(seen) == NUM_TENSORS + 1
    assert engine.values() == {0.0}
    assert publisher.publish(weights(3.0)).version == 1


def test_an_iterator_that_raises_aborts_the_session(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    def tensors() -> Any:
        yield from list(weights(1.0).items())[:3]
        raise RuntimeError("the trainer broke")

    with pytest.raises(RuntimeError, match="the trainer broke"):
        publisher.publish(tensors())
    assert engine.receiver._session is None
    assert publisher.publish(weights(3.0)).version == 1


@pytest.mark.parametrize(
    "bad", [("embed.weight",), ("embed.weight", [1.0]), (1, torch.zeros(1)), "embed.weight"]
)
def test_what_is_no_named_tensor_is_refused(publisher: WeightPublisher, bad: Any) -> None:
    with pytest.raises(ManifestMismatch, match="not a named tensor"):
        publisher.publish([bad])


def test_meta_sparse_and_distributed_tensors_are_refused_by_name(
    publisher: WeightPublisher,
) -> None:
    class Distributed(torch.Tensor):
        def full_tensor(self) -> None: ...

    tensors = weights(1.0)
    tensors["embed.weight"] = tensors["embed.weight"].to("meta")
    tensors["layers.0.q.weight"] = tensors["layers.0.q.weight"].to_sparse()
    tensors["norm.weight"] = tensors["norm.weight"].as_subclass(Distributed)
    with pytest.raises(ManifestMismatch) as caught:
        publisher.publish(tensors)
    text = str(caught.value)
    assert "embed.weight: got a tensor without data" in text
    assert "layers.0.q.weight: got a tensor with torch.sparse_coo" in text
    assert "norm.weight: got a distributed tensor" in text and "full_tensor()" in text


def test_a_tied_head_may_be_sent_when_it_agrees(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    tensors = weights(1.0)
    head = tensors["embed.weight"].clone()
    assert publisher.publish(tensors | {ALIAS: head}).updated == NUM_TENSORS
    assert publisher.publish(tensors | {ALIAS: head.double()}).updated == NUM_TENSORS
    alone = {ALIAS: head, **tensors}
    del alone["embed.weight"]
    assert publisher.publish(alone).updated == NUM_TENSORS
    assert publisher.publish(one_by_one({ALIAS: head} | tensors)).updated == NUM_TENSORS
    head[3, 3] = 7.0
    for form in (dict, one_by_one):
        with pytest.raises(ManifestMismatch, match=f"{ALIAS}: differs from embed.weight"):
            publisher.publish(form(tensors | {ALIAS: head}))
    assert engine.receiver.version == 4


def test_a_fused_tensor_is_split_into_its_components(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    engine.host.looks = False
    tensors = noise()
    parts = [tensors.pop(f"layers.0.{name}.weight") for name in "qkv"]
    report = publisher.publish(tensors | {FUSED: torch.cat(parts)})
    assert report.updated == NUM_TENSORS and report.num_tensors == NUM_TENSORS - 2
    for name, part in zip("qkv", parts, strict=True):
        assert torch.equal(engine.weight_map.read(f"layers.0.{name}.weight"), part)
    with pytest.raises(
        ManifestMismatch, match=r"qkv.weight: got shape \[3, 3\], expected \[32, 16\]"
    ):
        publisher.publish(tensors | {FUSED: torch.zeros(3, 3)})


def test_names_that_the_model_ignores_are_left_out(publisher: WeightPublisher) -> None:
    tensors = weights(1.0) | {"layers.0.rotary.inv_freq": torch.ones(8)}
    assert publisher.publish(tensors).updated == NUM_TENSORS
    assert publisher.publish(tensors).version == 2
    with pytest.raises(ManifestMismatch, match=r"inv_frequency: unknown"):
        publisher.publish(tensors | {"layers.0.rotary.inv_frequency": torch.ones(8)})


def test_strided_transposed_and_grad_tensors_are_packed_as_they_look(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    engine.host.looks = False
    tensors = noise(3)
    tensors["embed.weight"] = torch.randn(16, 24).to(torch.bfloat16).t()
    tensors["norm.weight"] = nn.Parameter(torch.randn(14).to(torch.bfloat16)[::2])
    publisher.publish(tensors)
    assert same(resident(engine), {name: tensor.detach() for name, tensor in tensors.items()})


def test_a_part_of_the_model_may_be_sent_and_the_report_says_what_was_left(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    engine.host.looks = False
    part = {"norm.weight": torch.full((7,), 5.0, dtype=torch.bfloat16)}
    report = publisher.publish(part, strict=False)
    assert report.updated == 1 and len(report.left) == NUM_TENSORS - 1
    assert "norm.weight" not in report.left
    assert report.fingerprint == weight_sync.fingerprint(weights(1.0) | part)
    assert report.fingerprint == publisher.fingerprint()
    empty = publisher.publish([], strict=False)
    assert (empty.updated, empty.version, empty.num_bytes) == (0, 3, 0)
    assert empty.fingerprint == report.fingerprint


def test_versions_only_grow_and_the_base_is_checked(publisher: WeightPublisher) -> None:
    assert publisher.publish(weights(1.0), version=7).version == 7
    assert publisher.publish(weights(1.0), base_version=7).version == 8
    with pytest.raises(StaleVersionError, match="got 8, expected more than 8"):
        publisher.publish(weights(1.0), version=8)
    with pytest.raises(StaleVersionError, match="got base_version 7, expected 8"):
        publisher.publish(weights(1.0), base_version=7)
    assert publisher.engine_info().version == 8


def test_unknown_choices_are_refused_before_anything_happens(engine: ToyEngine) -> None:
    with pytest.raises(ValueError, match="transport: got 'pigeon'"):
        WeightPublisher(engine, transport="pigeon")  # type: ignore[arg-type]
    publisher = WeightPublisher(engine)
    with pytest.raises(ValueError, match="kv_policy: got 'burn'"):
        publisher.publish(weights(1.0), kv_policy="burn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verify: got 'never'"):
        publisher.publish(weights(1.0), verify="never")  # type: ignore[arg-type]


def test_a_declared_fingerprint_that_does_not_fit_is_refused(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    tensors = weights(1.0)
    right = {name: weight_sync.tensor_fingerprint(tensor) for name, tensor in tensors.items()}
    assert publisher.publish(tensors, expected_fingerprints=right).version == 1
    with pytest.raises(weight_sync.FingerprintMismatch, match=r"norm.weight: got 0x"):
        publisher.publish(weights(2.0), expected_fingerprints=right | {"embed.weight": 1})
    assert engine.values() == {1.0}


def test_an_explicit_session_commits_all_it_was_sent_at_once(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    named = list(weights(1.0).items())
    assert publisher.begin(label="a") == 1
    assert publisher.in_session
    success, message = publisher.send(named[:4])
    assert success is True and "staged 4 tensors" in message
    publisher.send([])
    publisher.send(one_by_one(dict(named[4:])))
    assert engine.values() == {0.0} and engine.receiver.version == 0
    report = publisher.commit()
    assert (report.version, report.label, report.updated) == (1, "a", NUM_TENSORS)
    assert engine.values() == {1.0} and not publisher.in_session


def test_a_session_as_a_block_commits_at_its_end_and_aborts_when_it_raises(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    with publisher.session(label="a") as session:
        session.send(weights(1.0))
    assert session.report is not None and session.report.version == 1
    with pytest.raises(RuntimeError, match="stop"), publisher.session() as session:
        session.send(weights(2.0))
        raise RuntimeError("stop")
    assert engine.values() == {1.0} and engine.receiver._session is None


def test_a_session_that_failed_can_only_be_ended(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    publisher.begin()
    publisher.send({"norm.weight": weights(1.0)["norm.weight"]})
    with pytest.raises(ManifestMismatch, match=r"norm.weight: sent more than once"):
        publisher.send({"norm.weight": weights(1.0)["norm.weight"]})
    assert publisher.in_session  # else the next update call would be a transaction of its own
    with pytest.raises(SessionError, match="failed earlier"):
        publisher.send(weights(1.0))
    with pytest.raises(SessionError, match="failed earlier"):
        publisher.commit()
    assert not publisher.in_session and engine.values() == {0.0}
    with pytest.raises(SessionError, match="no session is open"):
        publisher.commit()
    publisher.abort()
    assert publisher.publish(weights(1.0)).version == 1


def test_an_incomplete_strict_session_is_refused_at_its_end(
    engine: ToyEngine, publisher: WeightPublisher
) -> None:
    publisher.begin()
    publisher.send(list(weights(1.0).items())[:-2])
    with pytest.raises(ManifestMismatch, match=r"covers 7 of 9 tensors(.|\n)*norm.weight"):
        publisher.commit()
    assert engine.values() == {0.0}
    publisher.begin(strict=False)
    with pytest.raises(SessionError, match="a session of this publisher is open"):
        publisher.publish(weights(1.0))
    publisher.abort()


def test_publishing_from_a_running_event_loop(publisher: WeightPublisher) -> None:
    assert asyncio.run(publisher.async_publish(weights(1.0), label="x")).label == "x"


def test_a_publisher_may_be_closed_twice_and_used_from_many_threads(engine: ToyEngine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with WeightPublisher(engine) as publisher, ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(publisher.publish, [weights(float(i)) for i in range(8)]))
    assert sorted(report.version for report in reports) == list(range(1, 9))
    publisher.close()


def test_an_asynchronous_iterator_goes_on_in_its_own_loop(engine: ToyEngine) -> None:
    async def tensors(value: float) -> AsyncIterator[tuple[str, torch.Tensor]]:
        loops.add(asyncio.get_running_loop())
        for item in weights(value).items():
            await asyncio.sleep(0)
            yield item

    async def train() -> None:
        loops.add(asyncio.get_running_loop())
        publisher = WeightPublisher(engine, timeout_s=10)
        assert (await publisher.async_publish(tensors(2.0))).version == 1
        assert await publisher.async_begin(strict=False) == 2
        await publisher.async_send(tensors(3.0))
        assert (await publisher.async_commit()).version == 2
        await publisher.async_begin()
        await publisher.async_abort()
        publisher.close()

    loops: set[asyncio.AbstractEventLoop] = set()
    asyncio.run(train())
    assert len(loops) == 1
    assert engine.values() == {3.0}


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.module.{}", "layers.0._checkpoint_wrapped_module.{}"],
)
def test_names_from_inside_wrappers_are_understood(
    engine: ToyEngine, publisher: WeightPublisher, wrapped: str
) -> None:
    def name_of(name: str) -> str:
        prefix = "layers.0."
        if wrapped.startswith(prefix):
            return wrapped.format(name.removeprefix(prefix)) if name.startswith(prefix) else name
        return wrapped.format(name)

    tensors = {name_of(name): tensor for name, tensor in weights(5.0).items()}
    tensors["_orig_mod.rotary_emb.inv_freq"] = torch.ones(4)
    publisher.publish(tensors, label=7)
    assert engine.values() == {5.0}
    assert publisher.engine_info().label == "7"
    with pytest.raises(ManifestMismatch, match=r"sent more than once|same tensor"):
        publisher.publish([*weights(5.0).items(), ("module.norm.weight", torch.ones(7).bfloat16())])
