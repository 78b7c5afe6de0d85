"""The torch calls that trainers make, with tensors on a GPU of this process or another, for engines near and far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_sender import Sender, model_of

import weight_sync
from rollout import Engine
from weight_sync.errors import (
    ManifestMismatch,
    NonFiniteWeightsError,
    PayloadRefused,
    TransportError,
)

pytestmark = pytest.mark.gpu

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
PROMPT = [5, 9, 2, 77]
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module", params=["inline", "local"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    torch.zeros(1, device="cuda")  # as in a trainer, which works on a GPU before it updates
    with Engine(
        folder, executor=request.param, device="cuda", kv_cache_bytes=4 << 20, request_timeout_s=60
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def sender() -> Iterator[Sender]:
    sender = Sender()
    yield sender
    sender.close()


def trained(folder: Path, seed: int, device: str = "cuda") -> dict[str, torch.Tensor]:
    model = model_of(folder, seed).to(device)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_served(engine: Engine, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The engine has these bytes and says what a model of them says, and no error of the GPU was left behind."""
    assert engine.weights_fingerprint() == weight_sync.fingerprint(tensors)
    model = model_of(folder, 0)
    model.load_state_dict(tensors, strict=False)
    output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    with torch.no_grad():
        rows = model(torch.tensor([PROMPT + output])).logits[0, len(PROMPT) - 1 : -1]
    assert rows.argmax(-1).tolist() == output
    torch.cuda.synchronize()
    assert int(torch.ones(10, device="cuda").sum()) == 10


DEVICES = [
    "cuda:0",
    pytest.param(
        "cuda:1",
        marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("load_format", [None, "flattened_bucket", "direct"])
def test_tensors_of_this_process_become_the_next_version(
    engine: Engine, folder: Path, load_format: str | None, device: str
) -> None:
    for seed in (1, 2):
        tensors = trained(folder, seed + len(str(load_format)), device)
        named: Any = list(tensors.items())
        if load_format == "flattened_bucket":
            bucket = weight_sync.FlattenedTensorBucket(named_tensors=named)
            assert bucket.get_flattened_tensor().is_cuda
            named = {
                "flattened_tensor": bucket.get_flattened_tensor(),
                "metadata": bucket.get_metadata(),
            }
        report = engine.update_weights_from_tensor(named, load_format, weight_version=seed)
        assert report.complete and engine.weight_version == str(seed)
        check_served(engine, folder, tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_wider_tensors_and_an_iterator_of_one_buffer(
    engine: Engine, folder: Path, device: str
) -> None:
    tensors = trained(folder, 21, device)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    assert engine.update_weights_from_tensor(wide).casts
    check_served(engine, folder, tensors)
    turned = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in trained(folder, 22, device).items()
    }
    engine.update_weights_from_tensor(turned)
    check_served(engine, folder, turned)
    tensors = trained(folder, 23, device)
    buffer = torch.empty(
        max(tensor.numel() for tensor in tensors.values()), dtype=torch.float32, device=device
    )

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            buffer.fill_(-99.0)

    engine.update_weights_from_tensor(one_by_one(), strict=True)
    check_served(engine, folder, tensors)


def test_what_is_written_on_another_stream_is_what_arrives(engine: Engine, folder: Path) -> None:
    """An update is packed on the caller's stream, after everything that this stream waits for."""
    tensors = trained(folder, 31)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for tensor in tensors.values():
            tensor.mul_(0.5)
        engine.update_weights_from_tensor(tensors)
    check_served(engine, folder, tensors)


def test_every_refusal_leaves_the_old_version_and_no_error_of_the_gpu(
    engine: Engine, folder: Path
) -> None:
    good = trained(folder, 41)
    engine.update_weights_from_tensor(good, weight_version="good")
    norm = good[NORM]
    spoilt = norm.clone()
    spoilt[3] = float("nan")
    for bad, error in (
        ({"unknown": norm}, ManifestMismatch),
        ({NORM: norm[:-1]}, ManifestMismatch),
        ({NORM: norm.int()}, ManifestMismatch),
        ([(NORM, norm), (NORM, norm)], ManifestMismatch),
        ({}, ManifestMismatch),
        ({NORM: spoilt}, NonFiniteWeightsError),
        ({**good, NORM: spoilt}, NonFiniteWeightsError),
        (b"cos\nsystem\n(X\x04\x00\x00\x00truetR.\xff", PayloadRefused),
    ):
        with pytest.raises(error):
            engine.update_weights_from_tensor(bad)
        assert engine.weight_version == "good"
    check_served(engine, folder, good)


@pytest.mark.parametrize(
    ("case", "load_format"), [("gpu model", None), ("gpu bucket", "flattened_bucket")]
)
def test_tensors_of_another_process_become_the_next_version_and_are_given_back(
    engine: Engine, folder: Path, sender: Sender, case: str, load_format: str | None
) -> None:
    [before] = sender.numbers("gpu bytes")
    for seed in (51, 52):
        [payload] = sender.payloads(case, folder, seed)
        report = engine.update_weights_from_tensor([payload], load_format, weight_version=seed)
        assert report.complete
        check_served(engine, folder, trained(folder, seed))
        assert sender.numbers("gpu bytes") == [before], "the sender's memory is still in use"


def test_a_payload_of_a_sender_that_is_gone_is_refused(engine: Engine, folder: Path) -> None:
    good = trained(folder, 61)
    engine.update_weights_from_tensor(good)
    sender = Sender()
    [payload] = sender.payloads("gpu model", folder, 62)
    sender.close()
    with pytest.raises((PayloadRefused, TransportError)):
        engine.update_weights_from_tensor([payload])
    check_served(engine, folder, good)
