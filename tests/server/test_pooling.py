"""Embeddings of any model and scores of a classifier over HTTP are the engine's own."""

import httpx
import numpy as np
import openai
import pytest

from rollout import Engine
from rollout.server import HttpServerEngineAdapter

SEQUENCES = [[5, 9, 2], [7], [17, 40, 3, 99]]


@pytest.fixture(scope="module")
def rewards(tiny_checkpoint):
    return tiny_checkpoint("qwen3", num_labels=1)


@pytest.fixture(scope="module")
def expected(folder):
    with Engine(folder, kv_cache_bytes=4 << 20) as engine:
        rows = engine.encode(input_ids=SEQUENCES)
        text = engine.encode("the heron")
    return [row["embedding"] for row in rows], text["embedding"]


def test_hidden_states_are_those_of_the_engine(http, expected):
    rows, text = expected
    found = http.post("/encode", json={"input_ids": SEQUENCES, "rid": ["a", "b", "c"]}).json()
    for row, wanted in zip(found, rows, strict=True):
        assert row["embedding"] == pytest.approx(wanted, abs=1e-5)
    assert [row["meta_info"]["id"] for row in found] == ["a", "b", "c"]
    assert [row["meta_info"]["prompt_tokens"] for row in found] == [3, 1, 4]
    assert found[0]["meta_info"]["weight_version"] == "0"
    one = http.post("/encode", json={"text": "the heron"}).json()
    assert one["embedding"] == pytest.approx(text, abs=1e-5)
    for path in ("/encode", "/classify", "/generate"):
        assert http.post(path, json={"text": []}).json() == []


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_openai_clients_embeddings_have_length_one(server, expected, encoding):
    rows, text = expected
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="default", input=SEQUENCES, encoding_format=encoding)
        plain = client.embeddings.create(model="default", input="the heron")
    assert [entry.index for entry in found.data] == [0, 1, 2]
    assert found.usage.prompt_tokens == found.usage.total_tokens == 8
    for entry, row in zip([*found.data, *plain.data], [*rows, text], strict=True):
        vector = entry.embedding
        if isinstance(vector, str):
            import base64

            vector = np.frombuffer(base64.b64decode(vector), dtype="<f4")
        np.testing.assert_allclose(vector, row / np.linalg.norm(row), rtol=1e-4, atol=1e-6)


def test_a_reward_model_scores_and_is_well(serve, rewards):
    with Engine(rewards, kv_cache_bytes=4 << 20) as engine:
        wanted = engine.classify(input_ids=SEQUENCES)
        detailed = engine.classify(input_ids=SEQUENCES[0], rid="r", return_meta_info=True)
        [listed] = engine.classify(input_ids=[SEQUENCES[0]], return_meta_info=True)
    assert detailed["scores"] == listed["scores"] == pytest.approx(wanted[:1], abs=1e-5)
    assert detailed["meta_info"]["id"] == "r"
    with (
        launch(rewards) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        HttpServerEngineAdapter(server.url) as adapter,
    ):
        found = http.post("/classify", json={"input_ids": SEQUENCES}).json()
        assert [row["embedding"][0] for row in found] == pytest.approx(wanted, abs=1e-5)
        assert found[0]["meta_info"]["weight_version"] == "0"
        assert adapter.classify(input_ids=SEQUENCES) == pytest.approx(wanted, abs=1e-5)
        assert adapter.encode(input_ids=SEQUENCES[1])["meta_info"]["prompt_tokens"] == 1
        assert http.get("/health_generate").json()["status"] == "ok"
        assert http.get("/model_info").json()["is_generation"] is False
        reply = http.post("/generate", json={"input_ids": [1]})
        assert reply.status_code == 400 and "classify" in reply.json()["message"]
        body = {"model_path": str(rewards), "weight_version": "next"}
        http.post("/update_weights_from_disk", json=body).raise_for_status()
        found = http.post("/classify", json={"input_ids": [5]}).json()
        assert found["meta_info"]["weight_version"] == "next"


def launch(folder):
    from rollout.server import launch_server_process

    return launch_server_process(folder, server={"port": 0}, kv_cache_bytes=4 << 20, num_threads=1)


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/encode", {}, "neither"),
        ("/encode", {"text": "a", "input_ids": [1]}, "both"),
        ("/encode", {"input_ids": [99999]}, "vocabulary"),
        ("/encode", {"text": "a", "rid": ["a", "b"]}, "rid"),
        ("/classify", {"input_ids": [1]}, "generates"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, "mixture"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": ["a", ""]}, "empty"),
    ],
)
def test_what_cannot_be_is_refused(http, path, body, word):
    reply = http.post(path, json=body)
    assert reply.status_code == 400 and word in reply.json()["message"], reply.text


def test_what_a_pause_cuts_off_is_to_be_asked_again(http, until):
    """A score of half a sequence is none: there is no partial answer, as there is of `/generate`."""
    import threading

    http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    replies = []
    asks = {
        "/encode": {"input_ids": [1, 2]},
        "/v1/embeddings": {"input": [1, 2]},
        "/v1/score": {"query": [1], "items": [[2]], "label_token_ids": [3]},
    }
    threads = [
        threading.Thread(target=lambda p=path, b=body: replies.append(http.post(p, json=b)))
        for path, body in asks.items()
    ]
    for thread in threads:
        thread.start()
    try:
        until("they are there", lambda: http.get("/get_load").json()[0]["num_reqs"] == 3)
        http.post("/abort_request", json={"abort_all": True}).raise_for_status()
        for thread in threads:
            thread.join(60)
    finally:
        http.post("/continue_generation", json={})
    assert [reply.status_code for reply in replies] == [503] * 3
    assert {reply.json()["error"]["class"] for reply in replies} == {"RequestAbortedError"}
