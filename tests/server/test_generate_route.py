"""`/generate` against a server in another process: what goes in, what comes out, and what is refused."""

import base64
import json

import httpx
import pytest
from safetensors.torch import load_file

from rollout import Engine
from rollout.server import HttpServerEngineAdapter
from rollout.server.access import Client
from rollout.server.calls import Call

GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}


def lines_of(http, body):
    with http.stream("POST", "/generate", json=body) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_prompt_is_completed_as_the_engine_would_in_process(http, folder):
    body = {
        "sampling_params": {**GREEDY, "temperature": 0.7, "sampling_seed": 5},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    }
    with Engine(str(folder), kv_cache_bytes=1 << 20) as engine:
        expected = engine.generate("the heron", **body)
    found = http.post("/generate", json={"text": "the heron", **body}).json()
    assert found["output_ids"] == expected["output_ids"] and found["text"] == expected["text"]
    meta, wanted = found["meta_info"], expected["meta_info"]
    assert set(meta) == set(wanted)
    assert meta["input_token_logprobs"][0] == [None, wanted["input_token_logprobs"][0][1], None]
    for key in ("output_token_logprobs", "output_top_logprobs", "input_token_logprobs"):
        assert meta[key] == json.loads(json.dumps(wanted[key]))
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert meta["weight_versions"] == [{"version": "0", "number": 0, "start": 0, "end": 6}]


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_both_methods_generate(http, method):
    reply = http.request(method, "/generate", json={"input_ids": [1, 2], "sampling_params": GREEDY})
    assert len(reply.json()["output_ids"]) == 6


def test_an_error_names_a_request_as_its_client_does():
    call = Call(Client("c", False), {}, 1, {"a1b2": "mine", "c3d4": None})
    assert str(call.told(ValueError("request a1b2: too long"))) == "request mine: too long"
    assert str(call.told(ValueError("request c3d4: too long"))) == "request c3d4: too long"


def test_batches_and_samples_come_as_a_list_prompt_major(http):
    body = {"input_ids": [[1, 2], [3, 4, 5]], "sampling_params": {**GREEDY, "n": 2}}
    results = http.post("/generate", json={**body, "rid": ["a", "b"]}).json()
    assert [r["meta_info"]["id"] for r in results] == ["a-0", "a-1", "b-0", "b-1"]
    assert [r["meta_info"]["prompt_tokens"] for r in results] == [2, 2, 3, 3]
    one = http.post("/generate", json={"input_ids": [[1, 2]], "sampling_params": GREEDY}).json()
    assert isinstance(one, list) and len(one) == 1


def test_a_stream_is_cumulative_and_ends_with_the_whole_result(http):
    body = {"text": "the", "sampling_params": GREEDY, "return_logprob": True, "rid": "mine"}
    whole = http.post("/generate", json=body).json()
    chunks = lines_of(http, {**body, "stream": True})
    assert [len(chunk["output_ids"]) for chunk in chunks] == [1, 2, 3, 4, 5, 6]
    assert all(chunk["meta_info"]["finish_reason"] is None for chunk in chunks[:-1])
    assert all(chunk["meta_info"]["id"] == "mine" for chunk in chunks)
    assert chunks[-1]["output_ids"] == whole["output_ids"] and chunks[-1]["text"] == whole["text"]


def test_samples_of_a_stream_say_which_they_are(http):
    body = {"text": "the", "sampling_params": {**GREEDY, "n": 2}, "stream": True}
    last = {chunk["index"]: chunk for chunk in lines_of(http, body)}
    assert sorted(last) == [0, 1]
    assert all(chunk["meta_info"]["finish_reason"] for chunk in last.values())


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "neither"),
        ({"text": "a", "input_ids": [1]}, "both"),
        ({"text": 3}, "text"),
        ({"input_ids": ["a"]}, "input_ids"),
        ({"input_ids": [1, 99999]}, "vocabulary"),
        ({"text": ""}, "empty"),
        ({"text": "a", "sampling_params": {"tempreature": 1}}, "temperature"),
        ({"text": "a", "sampling_params": {"n": 0}}, "n"),
        ({"text": "a", "samplin_params": {}}, "sampling_params"),
        ({"text": "a", "lora_path": "x"}, "LoRA"),
        ({"text": "a", "rid": ["a", "b"]}, "rid"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": "a", "timeout_s": -1}, "timeout_s"),
        ({"text": "a", "self": 1}, "self"),
        ({"text": "a", "stream": "yes"}, "stream"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_run_is_answered_with_400_and_the_reason(http, body, word, stream):
    reply = http.post("/generate", json={**({"stream": True} if stream else {}), **body})
    assert reply.status_code == 400, reply.text
    assert word in reply.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000])
def test_a_body_that_is_no_object_is_answered_with_400(http, content):
    assert http.post("/generate", content=content).status_code == 400


def test_a_file_of_rows_is_completed_as_its_tokens_are(http, folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    sampling = {"temperature": 0.0, "max_new_tokens": 6}
    expected = http.post("/generate", json={"input_ids": [5, 9, 2], "sampling_params": sampling})
    file = json.dumps(embedding[[5, 9, 2]].tolist()).encode()
    fields = {"sampling_params": json.dumps(sampling)}
    reply = http.post("/generate_from_file", files={"file": file}, data=fields)
    assert reply.status_code == 200, reply.text
    assert reply.json()["output_ids"] == expected.json()["output_ids"]
    alone = http.post("/generate_from_file", files={"file": file}).json()
    assert 0 < alone["meta_info"]["completion_tokens"] <= 512


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ({"files": {"file": b"[[0.5]]"}}, "input_embeds"),
        ({"files": {"file": b"[[0.5]"}}, "file: got what is no JSON"),
        ({"files": {"file": b"\xff\xfe"}}, "file: got what is no JSON"),
        ({"files": {"rows": b"[[0.5]]"}}, "`file`"),
        ({"files": {"file": b"[[0.5]]"}, "data": {"stream": "true"}}, "stream"),
        ({"files": {"file": b"[[0.5]]"}, "data": {"input_embeds": "[]"}}, "input_embeds"),
        ({"files": {"file": b"[[0.5]]"}, "data": {"sampling_params": "{}", "tex": "1"}}, "tex"),
        ({"files": {f"file{i}": b"1" for i in range(3)}}, "the form"),
        ({"data": {f"field{i}": "1" for i in range(70)}, "files": {"file": b"[]"}}, "the form"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, "the form"),
        ({"json": [[0.5]]}, "`file`"),
    ],
)
def test_a_form_that_cannot_be_run_is_answered_with_400_and_the_reason(http, form, word):
    reply = http.post("/generate_from_file", **form)
    assert reply.status_code == 400, reply.text
    assert word in reply.json()["error"]["message"]


def test_rows_in_place_of_tokens_come_as_lists_as_bytes_and_through_the_adapter(
    http, server, folder
):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    sampling = {"temperature": 0.0, "max_new_tokens": 6}
    prompts = [[5, 9, 2, 77], [11, 12]]
    rows = [embedding[ids] for ids in prompts]
    expected = http.post("/generate", json={"input_ids": prompts, "sampling_params": sampling})
    wanted = [result["output_ids"] for result in expected.json()]
    record = {
        "dtype": "float32",
        "shape": list(rows[0].shape),
        "data": base64.b64encode(rows[0].numpy().tobytes()).decode(),
    }
    for given, ids in (
        ([each.tolist() for each in rows], wanted),
        ([record, rows[1].tolist()], wanted),
        (record, wanted[:1]),
        (rows[0].tolist(), wanted[:1]),
    ):
        reply = http.post("/generate", json={"input_embeds": given, "sampling_params": sampling})
        assert reply.status_code == 200, reply.text
        found = reply.json() if isinstance(reply.json(), list) else [reply.json()]
        assert [result["output_ids"] for result in found] == ids
    with HttpServerEngineAdapter(server.url) as engine:
        one = engine.generate(input_embeds=rows[0], sampling_params=sampling)
        both = engine.generate(input_embeds=rows, sampling_params=sampling)
    assert [one["output_ids"], *(result["output_ids"] for result in both)] == [wanted[0], *wanted]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_embeds": [[0.5]]}, "expected the model's hidden size"),
        ({"input_embeds": [["a"]]}, "input_embeds of prompt 0"),
        ({"input_embeds": {"dtype": "int8", "shape": [1, 1], "data": ""}}, "Invalid enum value"),
        ({"input_embeds": {"dtype": "float32", "shape": [2, 64], "data": "AAAA"}}, "got 3 bytes"),
        ({"input_embeds": [[0.5]], "text": "a"}, "expected exactly one"),
    ],
)
def test_rows_that_are_none_are_answered_with_400(http, body, words):
    reply = http.post("/generate", json=body)
    assert reply.status_code == 400 and words in reply.json()["message"], reply.text


def test_the_server_says_what_it_is(http, folder):
    info = http.get("/server_info").json()
    wanted = ("tp_size", "pp_size", "dp_size", "ep_size", "num_gpus", "model_path", "dtype")
    assert set(wanted) <= set(info) and info["model_path"] == str(folder)
    assert info["served_model_name"] == str(folder) and info["disaggregation_mode"] == "null"
    assert http.get("/get_server_info").json().keys() == info.keys()
    model = http.get("/model_info").json()
    assert (model["weight_version"], model["model_type"]) == ("0", "qwen3")
    assert http.get("/get_load").json()[0]["num_reqs"] == 0
    load = http.get("/v1/loads", params={"include": "core"}).json()["loads"][0]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 0)


def test_health_asks_the_engine_and_health_generate_draws_a_token(http):
    assert http.get("/health").status_code == 200
    assert http.get("/ping").status_code == 200
    assert http.get("/health_generate").json()["weight_version"] == "0"
    http.post("/pause_generation", json={"mode": "in_place"})
    try:
        assert http.get("/health").status_code == 200
    finally:
        http.post("/continue_generation", json={})


def test_unknown_routes_and_methods_are_json_errors(http):
    assert http.get("/nothing").status_code == 404
    assert http.get("/nothing").json()["error"]["code"] == 404
    assert http.post("/generat").json()["message"] == "no route /generat; did you mean /generate?"
    wrong = http.get("/generate")
    assert wrong.status_code == 405
    assert wrong.json()["message"] == "/generate: got GET, expected POST or PUT"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    unknown = http.post("/release_memory_occupation", json={"tags": ["kv"]}).json()["message"]
    assert unknown.endswith("expected one of 'weights', 'kv_cache', 'cuda_graph'"), unknown
    assert http.delete("/generate").status_code == 405


def test_the_description_names_every_route(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/generate", "/health", "/update_weights_from_disk", "/pause_generation"} <= set(paths)
    assert all(
        "422" not in operation["responses"]
        for path in paths.values()
        for operation in path.values()
    )


def test_an_http2_preface_does_not_disturb_the_server(http, server):
    import socket

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as probe:
        probe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        while probe.recv(4096):
            pass
    assert http.get("/health").status_code == 200


def test_requests_that_come_together_are_all_answered(server):
    import asyncio

    async def ask_all():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

            async def one(i):
                body = {"input_ids": [1 + i % 200, 2], "sampling_params": {**GREEDY, "n": 1}}
                reply = await client.post("/generate", json=body)
                return reply.json()["output_ids"]

            return await asyncio.gather(*(one(i) for i in range(64)))

    assert all(len(ids) == 6 for ids in asyncio.run(ask_all()))
