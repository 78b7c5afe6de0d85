"""Who may come in, what they may do there, and how much they may ask for."""

import threading

import httpx
import pytest

from rollout.errors import ConfigError
from rollout.server import ServerConfig, launch_server_process

LONG = {"max_new_tokens": 400, "ignore_eos": True}
SHORT = {"max_new_tokens": 2, "ignore_eos": True}
KEYS = {
    "api_keys": ["anna-key", "bert-key"],
    "admin_api_key": "root-key",
    "max_body_bytes": 20_000,
    "max_prompts": 4,
    "max_call_tokens": 2000,
    "max_running_samples": 8,
}
ADMIN_ONLY = [
    ("POST", "/update_weights_from_disk", {"model_path": "/nowhere"}),
    ("POST", "/update_weights_from_tensor", {"tensors": []}),
    ("POST", "/begin_weight_update", {}),
    ("POST", "/end_weight_update", {}),
    ("POST", "/abort_weight_update", {}),
    ("POST", "/init_weights_update_group", {}),
    ("POST", "/pause_generation", {}),
    ("POST", "/continue_generation", {}),
    ("POST", "/release_memory_occupation", {"tags": ["kv_cache"]}),
    ("POST", "/resume_memory_occupation", {}),
    ("POST", "/start_profile", {}),
    ("POST", "/flush_cache", {}),
    ("POST", "/update_weight_version", {}),
    ("POST", "/slow_down", {}),
    ("POST", "/set_internal_state", {"server_args": {}}),
    ("POST", "/weights_checker", {}),
    ("GET", "/flush_cache", None),
    ("POST", "/abort_request", {"abort_all": True}),
]


@pytest.fixture(scope="module")
def server(serve):
    return serve(KEYS)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers", [{}, bearer("anna-keX"), bearer("x"), {"Authorization": "anna-key"}]
)
def test_without_a_key_only_the_pulse_can_be_felt(http, headers):
    for path in ("/server_info", "/metrics", "/v1/models", "/openapi.json", "/nothing"):
        reply = http.get(path, headers=headers)
        assert reply.status_code == 401, path
        assert reply.json()["error"]["type"] == "authentication_error"
    assert http.get("/health", headers=headers).json() == {"status": "ok"}


@pytest.mark.parametrize("name", ["Authorization", "X-API-Key"])
def test_of_two_keys_neither_counts(http, name):
    """What stands between client and server may have looked at the other one."""
    values = ["Bearer root-key", "Bearer x"] if name == "Authorization" else ["root-key", "x"]
    for pair in (values, values[::-1]):
        headers = [(name, value) for value in pair]
        assert http.get("/server_info", headers=headers).status_code == 401


def test_a_key_lets_its_client_generate(http):
    body = {"input_ids": [1, 2], "sampling_params": SHORT}
    for headers in (bearer("anna-key"), bearer("root-key"), {"X-API-Key": "bert-key"}):
        assert len(http.post("/generate", json=body, headers=headers).json()["output_ids"]) == 2


@pytest.mark.parametrize(("method", "path", "body"), ADMIN_ONLY)
def test_what_concerns_everybody_needs_the_admin_key(http, method, path, body):
    reply = http.request(method, path, json=body, headers=bearer("anna-key"))
    assert reply.status_code == 403, reply.text
    reply = http.request(method, path, json=body, headers=bearer("root-key"))
    assert reply.status_code not in (401, 403)


def in_background(http, key, rid, answers):
    def ask():
        body = {"input_ids": [1, 2], "sampling_params": LONG, "rid": rid}
        answers[key] = http.post("/generate", json=body, headers=bearer(key)).json()

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_the_same_id_of_two_clients_is_two_requests_and_each_aborts_its_own(http, until):
    root = bearer("root-key")
    http.post("/pause_generation", json={"mode": "in_place"}, headers=root)
    answers = {}
    try:
        threads = [in_background(http, key, "same", answers) for key in ("anna-key", "bert-key")]

        def load():
            return http.get("/get_load", headers=root).json()[0]["num_reqs"]

        until("both requests are there", lambda: load() == 2)
        body = {"rid": "same"}
        ended = http.post("/abort_request", json=body, headers=bearer("anna-key")).json()
        assert ended["num_requests"] == 1
        threads[0].join(60)
        assert answers["anna-key"]["meta_info"]["finish_reason"]["type"] == "abort"
        assert answers["anna-key"]["meta_info"]["id"] == "same"
        assert load() == 1  # Another client's request goes on.
        reply = http.post("/abort_request", json={"rid": "same"}, headers=bearer("anna-key"))
        assert reply.json()["num_requests"] == 0
    finally:
        http.post("/continue_generation", json={}, headers=root)
    threads[1].join(120)
    assert answers["bert-key"]["meta_info"]["finish_reason"]["type"] == "length"


def test_an_admin_aborts_anybodys_request(http, until):
    root, answers = bearer("root-key"), {}
    http.post("/pause_generation", json={"mode": "in_place"}, headers=root)
    try:
        thread = in_background(http, "anna-key", "hers", answers)
        until("it is there", lambda: http.get("/get_load", headers=root).json()[0]["num_reqs"] == 1)
        assert (
            http.post("/abort_request", json={"rid": "hers"}, headers=root).json()["num_requests"]
            == 1
        )
        thread.join(60)
    finally:
        http.post("/continue_generation", json={}, headers=root)
    assert answers["anna-key"]["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"text": "a" * 30_000}, "bytes"),
        ({"input_ids": [[1]] * 5}, "prompts"),
        ({"input_ids": [1], "sampling_params": {"n": 8, "max_new_tokens": 400}}, "tokens"),
        ({"input_ids": [1], "sampling_params": {"n": 8, "max_completion_tokens": 400}}, "tokens"),
        (
            {
                "input_ids": [1],
                "sampling_params": {"n": 8, "max_new_tokens": None, "max_tokens": 400},
            },
            "tokens",
        ),
        ({"input_ids": [1], "sampling_params": {"n": 9, "max_new_tokens": 1}}, "samples"),
    ],
)
def test_what_is_too_much_for_one_request_is_answered_with_413(http, body, word):
    reply = http.post("/generate", json=body, headers=bearer("anna-key"))
    assert reply.status_code == 413 and word in reply.json()["message"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(http):
    def endless():
        for _ in range(1000):
            yield b"x" * 1000

    try:
        status = http.post("/generate", content=endless(), headers=bearer("anna-key")).status_code
    except httpx.HTTPError:  # The server has closed the connection under the sender.
        status = 413
    assert status == 413
    assert http.get("/health").status_code == 200


def test_more_than_the_server_may_hold_is_answered_with_429(http, until):
    root, answers = bearer("root-key"), {}
    http.post("/pause_generation", json={"mode": "in_place"}, headers=root)
    try:
        body = {"input_ids": [1], "sampling_params": {"n": 8, "max_new_tokens": 100}}

        def ask():
            answers["many"] = http.post("/generate", json=body, headers=bearer("anna-key"))

        thread = threading.Thread(target=ask)
        thread.start()
        until(
            "they are there", lambda: http.get("/get_load", headers=root).json()[0]["num_reqs"] == 8
        )
        one = {"input_ids": [1], "sampling_params": SHORT}
        score = {"query": [1], "items": [[2]], "label_token_ids": [3]}
        for path, more in (
            ("/generate", one),
            ("/encode", {"input_ids": [1]}),
            ("/v1/score", score),
        ):
            reply = http.post(path, json=more, headers=bearer("bert-key"))
            assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
    finally:
        http.post("/continue_generation", json={}, headers=root)
    thread.join(120)
    assert answers["many"].status_code == 200 and len(answers["many"].json()) == 8


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"host": "0.0.0.0"}, "API key"),
        ({"host": "::"}, "API key"),
        ({"host": "example.org"}, "API key"),
        ({"api_keys": ("a", "b")}, "admin"),
        ({"admin_api_key": "a"}, "--api-key"),
        ({"api_keys": ("a",), "admin_api_key": "a"}, "twice"),
        ({"api_keys": ("with space",)}, "header"),
        ({"api_keys": ("",)}, "header"),
        ({"port": 70000}, "port"),
        ({"max_prompts": 0}, "max_prompts"),
        ({"ssl_certfile": "/nowhere.pem"}, "ssl_certfile"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_server_that_would_leave_the_door_open_does_not_start(folder, options, word):
    with pytest.raises(ConfigError, match=word):
        launch_server_process(folder, server=options)


def test_another_address_is_fine_with_a_key():
    ServerConfig(host="0.0.0.0", api_keys=("k",)).check()


def test_what_is_shown_of_a_configuration_has_no_keys():
    config = ServerConfig(api_keys=("s3cret",), admin_api_key="r00t", ssl_keyfile_password="w0rd")
    assert not any(word in repr(config) for word in ("s3cret", "r00t", "w0rd"))
