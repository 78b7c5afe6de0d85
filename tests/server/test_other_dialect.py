"""The generation and control half of the other RL dialect, as its trainers call it."""

import threading

import httpx
import pytest


def ask(http, **params):
    body = {"request_id": "r1", "token_ids": [5, 6, 7], "sampling_params": params}
    return http.post("/inference/v1/generate", json=body)


def test_token_ids_go_in_and_come_out(http):
    params = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    found = ask(http, **params, logprobs=1, detokenize=False, prompt_logprobs=0).json()
    native = http.post(
        "/generate",
        json={
            "input_ids": [5, 6, 7],
            "sampling_params": {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
        },
    ).json()
    choice = found["choices"][0]
    assert found["request_id"] == "r1" and choice["token_ids"] == native["output_ids"]
    values = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert values == [value for value, _, _ in native["meta_info"]["output_token_logprobs"]]
    assert choice["logprobs"]["content"][0]["token"] == f"token_id:{choice['token_ids'][0]}"
    assert choice["finish_reason"] == "length" and len(found["prompt_logprobs"]) == 3
    assert len(ask(http, n=3, max_tokens=2, seed=1).json()["choices"]) == 3


@pytest.mark.parametrize(
    ("route", "name"),
    [
        ("/inference/v1/generate", "token_ids"),
        ("/generate", "input_ids"),
        ("/v1/completions", "prompt"),
    ],
)
def test_a_salt_keeps_prefixes_apart(http, route, name):
    def cached(salt):
        before = counted()
        body = {name: [*range(100, 140)], "sampling_params": {}, "cache_salt": salt}
        if route == "/v1/completions":
            del body["sampling_params"]
        http.post(route, json=body).raise_for_status()
        return counted() > before

    def counted():
        lines = http.get("/metrics").text.splitlines()
        (line,) = [row for row in lines if row.startswith("rollout_cached_tokens_total ")]
        return float(line.split()[1])

    assert [cached(f"{route}{salt}") for salt in (1, 2, 1)] == [False, False, True]


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"max_tokens": -1}, 400),
        ({"tempo": 1}, 400),
        ({"bad_words": ["a"]}, 501),
        ({"logprobs": -2}, 400),
    ],
)
def test_what_cannot_be_honoured_is_refused(http, params, status):
    assert ask(http, **params).status_code == status


def test_text_goes_to_token_ids_and_back(http):
    found = http.post("/tokenize", json={"prompt": "the heron", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert (
        http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == "the heron"
    )
    assert http.post("/detokenize", json={"tokens": [99999]}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<bos>", "<eos>", None)


def in_background(http, answers, max_tokens):
    def work():
        answers.append(ask(http, max_tokens=max_tokens, ignore_eos=True).json())

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_pause_aborts_waits_or_keeps(http, until, mode):
    answers = []
    thread = in_background(http, answers, 300)
    until("it runs", lambda: http.get("/get_load").json()[0]["num_reqs"] == 1 or answers)
    assert http.post("/pause", params={"mode": mode}).status_code == 200
    assert http.get("/is_paused").json() == {"is_paused": True}
    try:
        if mode != "keep":
            thread.join(120)
            assert len(answers) == 1
        later = []
        waiting = in_background(http, later, 2)
        assert not later
    finally:
        assert http.post("/resume").status_code == 200
    waiting.join(120)
    thread.join(120)
    assert http.get("/is_paused").json() == {"is_paused": False}
    choice = answers[0]["choices"][0]
    if mode == "abort":
        assert choice["finish_reason"] in ("abort", "length")
    else:
        assert choice["finish_reason"] == "length" and len(choice["token_ids"]) == 300
    assert len(later[0]["choices"][0]["token_ids"]) == 2


def test_a_pause_that_waits_ends_with_resume_or_with_its_client(http, server, until):
    http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    answers, replies = [], []
    running = in_background(http, answers, 3)
    try:
        until("it is there", lambda: http.get("/get_load").json()[0]["num_reqs"] == 1)

        def wait():
            replies.append(http.post("/pause", params={"mode": "wait"}))

        # What is frozen never ends: whoever waits for that waits until somebody resumes, or gives up.
        with httpx.Client(base_url=server.url, timeout=httpx.Timeout(60.0, read=1.0)) as impatient:
            with pytest.raises(httpx.ReadTimeout):
                impatient.post("/pause", params={"mode": "wait"})
        later = in_background(http, answers, 2)
        until("the next one came in", lambda: http.get("/get_load").json()[0]["num_reqs"] == 2)
        waiting = threading.Thread(target=wait)
        waiting.start()
        held = in_background(http, answers, 2)
        until("it is held back", lambda: not replies and http.get("/metrics").status_code == 200)
    finally:
        http.post("/resume").raise_for_status()
    for thread in (running, later, held):
        thread.join(120)
    assert sorted(len(found["choices"][0]["token_ids"]) for found in answers) == [2, 2, 3]
    waiting.join(120)
    if replies[0].status_code == 400:  # It had begun to wait when `/resume` came.
        assert "resumed" in replies[0].json()["message"]
    else:
        http.post("/resume").raise_for_status()


def test_sleeping_at_level_one_keeps_the_weights(http):
    before = ask(http, max_tokens=5, temperature=0.0).json()["choices"][0]["token_ids"]
    assert http.post("/sleep", params={"level": 1}).status_code == 200
    assert http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert http.post("/wake_up?tags=weights&tags=kv_cache").status_code == 200
    assert http.get("/is_sleeping").json() == {"is_sleeping": False}
    assert ask(http, max_tokens=5, temperature=0.0).json()["choices"][0]["token_ids"] == before


def test_weights_that_slept_at_level_two_must_come_again(http, folder):
    http.post("/sleep", params={"level": 2}).raise_for_status()
    http.post("/wake_up").raise_for_status()
    assert ask(http, max_tokens=2).status_code == 503
    http.post("/update_weights_from_disk", json={"model_path": str(folder)}).raise_for_status()
    assert ask(http, max_tokens=2).status_code == 200
    assert http.post("/sleep", params={"level": 3}).status_code == 400


def test_caches_and_sizes(http):
    assert http.post("/reset_prefix_cache").json()["success"] is True
    assert http.get("/get_world_size").json() == {"world_size": 1}
    assert http.post("/pause", params={"mode": "sometimes"}).status_code == 400
