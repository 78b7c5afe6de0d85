"""What trainers of other makes send goes through `Engine.update_weights_from_tensor` as it is."""

from types import SimpleNamespace

import pytest
from foreign_sender import Sender, model_of

import weight_sync
from rollout import Engine
from rollout.errors import PayloadRefused, WeightUpdateError


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(folder, executor="inline", kv_cache_bytes=4 << 20, num_threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def sender():
    sender = Sender()
    yield sender
    sender.close()


@pytest.mark.parametrize(
    ("case", "load_format"), [("model", None), ("model bucket", "flattened_bucket")]
)
@pytest.mark.parametrize("form", ["text", "list of every rank", "request"])
def test_a_serialized_model_becomes_the_next_version(
    engine, sender, folder, case, load_format, form
):
    seed = len(case + form)
    [payload] = sender.payloads(case, folder, seed)
    if form == "request":
        request = SimpleNamespace(
            serialized_named_tensors=[payload],
            load_format=load_format,
            flush_cache=False,
            abort_all_requests=False,
            weight_version=f"step {seed}",
        )
        success, _ = engine.update_weights_from_tensor(request)
    else:
        given = payload if form == "text" else [payload, payload]
        success, _ = engine.update_weights_from_tensor(
            given, load_format, weight_version=f"step {seed}"
        )
    assert success and engine.weight_version == f"step {seed}"
    assert engine.weights_fingerprint() == fingerprint_of(folder, seed)


def fingerprint_of(folder, seed):
    return weight_sync.fingerprint(dict(model_of(folder, seed).named_parameters()))


def test_a_payload_of_something_else_leaves_the_version_as_it_is(engine):
    before = engine.weight_version, engine.weights_fingerprint()
    with pytest.raises(PayloadRefused, match=r"the global os\.system") as refusal:
        engine.update_weights_from_tensor(b"cos\nsystem\n(X\x04\x00\x00\x00truetR.\xff")
    assert isinstance(refusal.value, WeightUpdateError)
    assert (engine.weight_version, engine.weights_fingerprint()) == before


def test_a_payload_in_an_explicit_session_is_staged(engine, sender, folder):
    [payload] = sender.payloads("model", folder, 3)
    engine.begin_weight_update(weight_version="whole", strict=True)
    engine.update_weights_from_tensor([payload])
    assert engine.weight_version != "whole"
    engine.end_weight_update()
    assert engine.weight_version == "whole"
    assert engine.weights_fingerprint() == fingerprint_of(folder, 3)


def test_a_request_that_asks_for_what_cannot_be_honoured_is_refused(engine):
    request = SimpleNamespace(serialized_named_tensors=[b"\x80\x04]."], keep_pause=True)
    with pytest.raises(WeightUpdateError, match="keep_pause=True"):
        engine.update_weights_from_tensor(request)
