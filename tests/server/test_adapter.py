"""`HttpServerEngineAdapter`: an engine's surface over HTTP gives what the engine gives, errors included."""

import asyncio
import http.server
import threading

import pytest
import torch

from rollout import Engine, EngineBase
from rollout.errors import (
    EngineClosedError,
    EngineDiedError,
    InvalidRequestError,
    ManifestMismatch,
    RolloutError,
    TornWeightsError,
    WeightUpdateError,
)
from rollout.server import HttpServerEngineAdapter
from rollout.server.adapter_wire import pairs
from weight_sync import FlattenedTensorBucket, fingerprint

ASK = {
    "input_ids": [[5, 6, 7], [8, 9]],
    "sampling_params": {"max_new_tokens": 6, "temperature": 0.8, "sampling_seed": 3, "n": 2},
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 2,
}
VARY = ("id", "e2e_latency", "engine_id", "cached_tokens")


@pytest.fixture(scope="module")
def adapter(serve):
    server = serve({"api_keys": ["k"], "admin_api_key": "root"})
    with HttpServerEngineAdapter(server.url, api_key="root", bucket_bytes=50_000) as adapter:
        yield adapter


@pytest.fixture
def other(tiny_checkpoint, reference_model):
    folder = tiny_checkpoint("qwen3", initializer_range=0.25)
    return dict(reference_model(folder).named_parameters())


def steady(results):
    for result in results:
        for key in VARY:
            result["meta_info"].pop(key)
    return results


def test_results_are_those_of_an_engine_in_process(adapter, folder):
    with Engine(str(folder), kv_cache_bytes=4 << 20) as engine:
        expected = steady(engine.generate(**ASK))
        assert steady(adapter.generate(**ASK)) == expected
        assert steady(asyncio.run(adapter.async_generate(**ASK))) == expected
        last = {chunk["index"]: chunk for chunk in adapter.generate(**ASK, stream=True)}
        assert [r["output_ids"] for r in expected] == [last[i]["output_ids"] for i in range(4)]
        assert adapter.weights_fingerprint() == engine.weights_fingerprint()
        name = "model.norm.weight"
        assert adapter.get_weights_by_name(name) == engine.get_weights_by_name(name)
        labels = [7, 8]
        assert adapter.score([1], [[2]], labels) == engine.score([1], [[2]], labels)
    assert isinstance(adapter, EngineBase)


def test_an_asynchronous_stream_ends_with_the_result(adapter):
    async def run():
        chunks = await adapter.async_generate(**ASK, stream=True)
        return {chunk["index"]: chunk async for chunk in chunks}

    last = asyncio.run(run())
    assert all(chunk["meta_info"]["finish_reason"] for chunk in last.values()) and len(last) == 4


def test_a_model_in_many_buckets_becomes_one_version(adapter, other):
    before = adapter.version
    success, message = adapter.update_weights_from_tensor(other, weight_version=9)
    assert success and "9" in message
    assert (adapter.version, adapter.get_weight_version()) == (before + 1, "9")
    assert adapter.weights_fingerprint() == fingerprint(other.items())


def test_a_bucket_and_a_session_are_taken_as_by_an_engine(adapter, other):
    adapter.begin_weight_update(weight_version="s")
    with pytest.raises(WeightUpdateError):
        HttpServerEngineAdapter(adapter.url, api_key="root").begin_weight_update()
    bucket = FlattenedTensorBucket(named_tensors=list(other.items()))
    adapter.update_weights_from_tensor(bucket, load_format="flattened_bucket", flush_cache=False)
    assert adapter.get_weight_version() != "s"
    assert adapter.end_weight_update().label == "s"
    assert adapter.weights_fingerprint() == fingerprint(other.items())


def test_errors_have_the_types_that_the_engine_raised(adapter, folder, other):
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        adapter.generate(input_ids=[99999])
    with pytest.raises(InvalidRequestError, match="temperature"):
        next(
            adapter.generate(
                input_ids=[1], sampling_params={"tempo": 1, "temprature": 1}, stream=True
            )
        )
    before = adapter.weights_fingerprint()
    gone = torch.ones(64)
    gone.untyped_storage().resize_(0)
    for tensor, why in ((gone, "given back"), (torch.ones(64, device="meta"), "without data")):
        with pytest.raises(ManifestMismatch, match=f"nobody: got a tensor .*{why}"):
            adapter.update_weights_from_tensor([("nobody", tensor)])
    with pytest.raises(ManifestMismatch, match="nobody"):
        adapter.update_weights_from_tensor({**other, "nobody.weight": other["model.norm.weight"]})
    assert adapter.weights_fingerprint() == before
    with pytest.raises(RolloutError, match="admin"):
        HttpServerEngineAdapter(adapter.url, api_key="k").pause_generation()
    with pytest.raises(EngineDiedError):
        HttpServerEngineAdapter("http://127.0.0.1:9").get_weight_version()
    closed = HttpServerEngineAdapter(adapter.url)
    closed.shutdown()
    with pytest.raises(EngineClosedError):
        closed.get_weight_version()


def test_pauses_aborts_memory_and_caches(adapter, until):
    adapter.pause_generation("in_place")
    found = []
    thread = threading.Thread(target=lambda: found.append(adapter.generate(input_ids=[1], rid="r")))
    thread.start()
    try:
        until("it is there", lambda: adapter.get_server_info()["num_waiting_reqs"] == 1)
        with pytest.raises(RolloutError):
            adapter.flush_cache()
        assert adapter.abort_request("r") == 1
        thread.join(60)
    finally:
        adapter.continue_generation()
    assert found[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert adapter.release_memory_occupation(["kv_cache"])["tags"] == ["kv_cache"]
    assert adapter.resume_memory_occupation(["kv_cache"])["num_bytes"] > 0
    adapter.flush_cache()
    assert adapter.get_model_info()["model_type"] == "qwen3"


def test_labels_noise_limits_and_delays(adapter, other):
    adapter.update_weights_from_tensor(other, weight_version="a")
    adapter.update_weight_version("b")
    assert adapter.get_weight_version() == "b"
    before = adapter.weights_checksums()
    assert before.keys() == other.keys()
    assert adapter.reset_weights() > 0
    with pytest.raises(TornWeightsError, match="noise"):
        adapter.generate(input_ids=[1])
    adapter.update_weights_from_tensor(other)
    assert adapter.weights_checksums() == before
    most = adapter.get_server_info()["max_running_requests"]
    adapter.set_internal_state({"max_running_requests": 2})
    assert adapter.get_server_info()["max_running_requests"] == 2
    adapter.set_internal_state({"max_running_requests": most})
    with pytest.raises(InvalidRequestError, match="forward_sleep_time"):
        adapter.slow_down(-1.0)
    adapter.slow_down(0)


def test_twins_of_control_calls_are_awaitable(adapter, folder):
    async def run():
        await adapter.async_pause_generation("in_place")
        await adapter.async_continue_generation()
        report = await adapter.async_update_weights_from_disk(folder, weight_version="d")
        return report.label, await adapter.async_get_weight_version()

    assert asyncio.run(run()) == ("d", "d")


@pytest.fixture
def answering():
    """`answering(status, body)`: an adapter of a server that says this to everything."""
    servers = []

    def start(status, body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return HttpServerEngineAdapter(f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "word"),
    [
        (200, b"{}", "another version"),
        (200, b"<html>", "no JSON"),
        (200, b'{"success": true, "message": "ok"}', "another version"),
        (404, b'{"error": "not found"}', "not found"),
        (404, b'{"detail": "Not Found"}', "Not Found"),
        (500, b"[]", r"\[\]"),
        (502, b"bad gateway", "502"),
    ],
)
def test_a_server_of_another_kind_or_version_is_told_from_an_engines_refusal(
    answering, other, status, body, word
):
    with answering(status, body) as adapter:
        norm = {"model.norm.weight": other["model.norm.weight"]}
        for call in (
            lambda: adapter.update_weights_from_tensor(norm),
            lambda: adapter.pause_generation(),
            lambda: adapter.score([1], [[2]], [3]),
        ):
            with pytest.raises(RolloutError, match=word):
                call()


def test_what_is_sent_of_a_module_are_its_weights_with_its_routers_biases():
    module = torch.nn.Linear(2, 3, bias=False)
    module.register_buffer("e_score_correction_bias", torch.ones(3))
    module.register_buffer("inv_freq", torch.ones(3))
    bucket = FlattenedTensorBucket(named_tensors=module)
    parts = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    for given in (module, bucket, parts):
        assert [name for name, _ in pairs(given)] == ["weight", "e_score_correction_bias"]
