"""Fields and forms that trainers and the routers before engines send, beside those of the dialects' own tests."""

import sys
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "http_trainers"))

ROUTED = {
    "model": None,
    "log_metrics": True,
    "return_hidden_states": False,
    "background": False,
    "no_logs": False,
    "return_bytes": False,
    "return_entropy": False,
}
"""What sglang-router 0.3.2 adds to every `/generate`."""


def test_what_a_router_adds_to_a_request_is_no_reason_to_refuse_it(http, folder):
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}, **ROUTED}
    assert http.post("/generate", json=body).status_code == 200
    assert http.post("/generate", json={**body, "model": str(folder)}).status_code == 200
    assert http.post("/generate", json={**body, "model": "another"}).status_code == 404
    for name in ("return_bytes", "return_entropy", "return_hidden_states"):
        answer = http.post("/generate", json={**body, name: True})
        assert answer.status_code == 400 and name in answer.text
    body = {"model": folder.name, "prompt": "a", "max_tokens": 1, "return_hidden_states": False}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert (
        http.post("/v1/completions", json={**body, "return_hidden_states": True}).status_code == 501
    )


def test_what_belongs_in_the_address_may_be_in_the_body(http):
    assert http.post("/pause", json={"mode": "keep"}).json()["mode"] == "keep"
    assert http.post("/pause?mode=abort", json={"clear_cache": False}).json()["mode"] == "abort"
    assert http.post("/resume", json={}).status_code == 200
    assert http.post("/sleep", json={"level": 1}).json()["level"] == 1
    assert http.post("/wake_up", json={"tags": ["weights", "kv_cache"]}).status_code == 200
    assert http.request("GET", "/health", json={}).status_code == 200
    for path, body in (
        ("/sleep", {"depth": 2}),
        ("/resume", {"mode": "keep"}),
        ("/pause", {"mode": "sometimes"}),
        ("/end_weight_update", {"weight_version": "7"}),
    ):
        assert http.post(path, json=body).status_code == 400


def test_a_reset_of_prefixes_may_reset_what_runs(http, until):
    done = []

    def ask():
        body = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 60, "ignore_eos": True}}
        done.append(http.post("/inference/v1/generate", json=body).json()["choices"][0])

    import threading

    thread = threading.Thread(target=ask)
    http.post("/slow_down", json={"forward_sleep_time": 0.1}).raise_for_status()
    try:
        thread.start()
        until("it runs", lambda: http.get("/get_load").json()[0]["num_tokens"] > 0)
        assert http.post("/reset_prefix_cache").status_code == 400
        body = {"reset_running_requests": True}
        assert http.post("/reset_prefix_cache", json=body).status_code == 200
        assert http.post("/flush_cache", json={"recompute": True}).status_code == 200
    finally:
        http.post("/slow_down", json={"forward_sleep_time": 0}).raise_for_status()
    thread.join(60)
    assert len(done[0]["token_ids"]) == 60


def test_ids_without_text_are_no_text(http):
    known = http.post("/tokenize", json={"prompt": "the heron"}).json()["tokens"]
    answer = http.post("/detokenize", json={"tokens": [*known, 287]})  # 266 tokens, 288 rows
    assert answer.json()["prompt"] == "the heron"
    assert http.post("/detokenize", json={"tokens": [288]}).status_code == 400


def test_memory_is_given_back_and_taken_by_the_tags_that_trainers_send(http):
    body = {"tags": ["kv_cache", "cuda_graph"]}
    assert "kv_cache" in http.post("/release_memory_occupation", json=body).json()["tags"]
    assert "kv_cache" in http.post("/resume_memory_occupation", json=body).json()["tags"]
    assert http.post("/resume_memory_occupation", json={"tags": ["graphs"]}).status_code == 400


def test_a_profile_that_chooses_nothing_may_name_what_it_does_not_choose(http):
    body = {
        **dict.fromkeys(("output_dir", "start_step", "num_steps", "activities")),
        "profile_by_stage": False,
        "with_stack": None,
        "record_shapes": None,
    }
    assert http.post("/start_profile", json=body).status_code == 200
    assert http.post("/stop_profile", json={}).status_code == 200
    assert http.post("/start_profile", json={**body, "profile_by_stage": True}).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/finish_weight_update",
        "/init_broadcaster",
        "/load_lora_adapter",
        "/v1/load_lora_adapter",
    ],
)
def test_transfers_of_another_engine_are_refused_with_a_way_out(http, path):
    answer = http.post(path, json={"init_info": {}})
    assert answer.status_code == 501 and "publish" in answer.json()["message"]
    answer = http.post("/update_weights", json={"update_info": {"names": []}})
    assert answer.status_code == 501 and "WeightPublisher" in answer.json()["message"]
    assert http.post("/update_weights", json={}).status_code == 400


def test_tensors_may_come_one_by_one_over_the_only_group(server, http, folder):
    """As skyrl-train 0.3.1 sends them: it names the group when it makes it, and then never again."""
    from trainer_side import Group, in_background

    group = Group("skyrl", 2)
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}

    def post(path, body=None):
        with httpx.Client(base_url=server.url, timeout=60.0) as client:
            client.post(path, json=body).raise_for_status()

    with in_background() as start:
        body = {"master_address": "127.0.0.1", "master_port": group.port, "rank_offset": 1}
        body |= {"world_size": 2, "group_name": "skyrl", "backend": "gloo"}
        start(post, "/init_weights_update_group", body)
        group.meet()
    for name, tensor in tensors.items():
        with in_background() as start:
            body = {"name": name, "dtype": "torch.float32", "shape": list(tensor.shape)}
            start(post, "/update_weights_from_distributed", body)
            group.broadcast({name: tensor})
    post("/destroy_weights_update_group")
    name = "model.norm.weight"
    found = http.get("/get_weights_by_name", params={"name": name}).json()
    assert torch.equal(torch.tensor(found), tensors[name])
    answer = http.post("/update_weights_from_distributed", json={"name": name, "dtype": "float32"})
    assert answer.status_code == 400 and "shape" in answer.json()["message"]
    http.post("/update_weights_from_disk", json={"model_path": str(folder)}).raise_for_status()


def test_a_model_keeps_its_name_when_its_weights_come_from_a_folder(http, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    body = {"model_path": str(tmp_path), "abort_all_requests": True}
    http.post("/update_weights_from_disk", json=body).raise_for_status()
    assert http.get("/v1/models").json()["data"][0]["id"] == str(folder)
    for name in (str(folder), folder.name, str(tmp_path)):
        answer = http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200 and answer.json()["model"] == str(folder)
    http.post("/update_weights_from_disk", json={"model_path": str(folder)}).raise_for_status()
