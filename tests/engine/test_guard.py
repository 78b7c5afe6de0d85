"""An engine whose address leaves the machine: with its key everything works, without it nothing does."""

import stat
from pathlib import Path

import pytest
import torch

import weight_sync
from rollout import Engine, RolloutPool
from rollout.errors import ConfigError, InsecureAddressError, UnauthorizedError
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.wire import keys
from weight_sync.wire.keys import shown

OPTIONS = {"kv_cache_bytes": 4 << 20, "num_threads": 1, "skip_tokenizer_init": True}
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
ELSEWHERE = "tcp://0.0.0.0:0"


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module", params=["inline", "local", "pool"])
def engine(request, folder):
    if request.param == "pool":
        served = RolloutPool(folder, num_replicas=1, listen=ELSEWHERE, **OPTIONS)
    else:
        served = Engine(folder, executor=request.param, listen=ELSEWHERE, **OPTIONS)
    with served:
        yield served


def trained(folder, seed):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_client_and_a_publisher_with_the_address_do_everything(engine, folder):
    address = engine.address
    assert "?key=" in address
    model = trained(folder, 1)
    with Engine.connect(address) as client:
        before = client.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)
        assert len(before["output_ids"]) == 4
        chunks = list(client.generate(input_ids=[1, 2, 3], sampling_params=GREEDY, stream=True))
        assert chunks[-1]["output_ids"] == before["output_ids"]
        assert client.update_weights_from_tensor(model, weight_version="by client").version
    publisher = WeightPublisher(address)
    try:
        publisher.publish(trained(folder, 2), label="by publisher")
    finally:
        publisher.close()
    assert engine.weight_version == "by publisher"
    assert engine.weights_fingerprint() == weight_sync.fingerprint(
        dict(trained(folder, 2).named_parameters())
    )


def test_without_the_key_nobody_reads_pushes_or_shuts_down(engine):
    before = engine.weight_version, engine.weights_fingerprint()
    bare = shown(engine.address)
    other = keys.ServerKeys.new().key
    for address in (bare, f"{bare}?key={other}"):
        with pytest.raises(UnauthorizedError, match="does not shake hands"):
            Engine.connect(address)
        with pytest.raises(UnauthorizedError, match="does not shake hands"):
            WeightPublisher(address).publish({"x": torch.ones(1)})
    assert (engine.weight_version, engine.weights_fingerprint()) == before
    assert engine.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)["output_ids"]


def test_the_key_is_in_the_address_alone(engine, caplog):
    key = engine.address.partition("?key=")[2]
    assert key[:20] not in repr(engine) + str(engine.status()) + str(engine.get_server_info())
    assert key[:20] not in caplog.text


def test_keys_in_a_file_let_clients_connect_after_a_restart(folder, tmp_path):
    listen = f"tcp://127.0.0.1:0?key_file={tmp_path}/engine.key"
    with Engine(folder, executor="local", listen=listen, **OPTIONS) as engine:
        first = engine.address
        port = shown(first).rpartition(":")[2]
        by_file = f"tcp://127.0.0.1:{port}?key_file={tmp_path}/engine.key"
        with Engine.connect(by_file) as client:
            assert client.version == engine.version
    with Engine(folder, executor="local", listen=listen, **OPTIONS) as engine:
        assert engine.address.partition("?")[2] == first.partition("?")[2]
        with Engine.connect(engine.address) as client:
            assert client.version == engine.version


def test_a_socket_file_in_a_folder_that_others_may_enter_is_refused_before_anything_starts(
    folder, tmp_path
):
    tmp_path.chmod(0o755)
    for executor in ("inline", "local"):
        with pytest.raises(InsecureAddressError, match="mkdir -m 700"):
            Engine(folder, executor=executor, listen=f"ipc://{tmp_path}/socket", **OPTIONS)
    assert list(tmp_path.iterdir()) == []
    with Engine(folder, listen=f"ipc://{tmp_path}/socket", insecure=True, **OPTIONS) as engine:
        assert engine.address == f"ipc://{tmp_path}/socket"


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_the_private_socket_of_an_engine_is_its_owners_alone(folder, executor):
    with Engine(folder, executor=executor, **OPTIONS) as engine:
        path = Path(engine.address.removeprefix("ipc://"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_without_curve_an_address_elsewhere_is_refused_unless_insecure(folder, monkeypatch):
    monkeypatch.setattr(keys.zmq, "has", lambda what: False)
    with pytest.raises(InsecureAddressError, match="insecure=True"):
        Engine(folder, listen=ELSEWHERE, **OPTIONS)
    with Engine(folder, listen=ELSEWHERE, insecure=True, **OPTIONS) as engine:
        with Engine.connect(engine.address) as client:
            assert client.version == engine.version


@pytest.mark.parametrize("query", ["key=x", "keyfile=x", ""])
def test_an_address_to_listen_at_with_another_option_is_refused(folder, query):
    with pytest.raises(ConfigError, match="listen: an address has one option at most"):
        Engine(folder, listen=f"tcp://127.0.0.1:0?{query}", **OPTIONS)
