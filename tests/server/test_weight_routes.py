"""Weight updates over HTTP: every way in, and what a refusal looks like."""

import base64
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import httpx
import msgspec
import pytest
import torch
import torch.distributed as dist
from foreign_sender import Sender, model_of

from weight_sync import FlattenedTensorBucket, fingerprint

ASK = {
    "input_ids": [5, 6, 7],
    "sampling_params": {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def other(tiny_checkpoint, reference_model):
    """Another model of the same shape: (folder, named tensors)."""
    folder = tiny_checkpoint("qwen3", initializer_range=0.25)
    return folder, dict(reference_model(folder).named_parameters())


@pytest.fixture(autouse=True)
def first_weights(http, folder):
    yield
    http.post("/abort_weight_update")
    http.post("/update_weights_from_disk", json={"model_path": str(folder)}).raise_for_status()


def raw(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def record(name, tensor, data=None):
    content = raw(tensor) if data is None else data
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shape": list(tensor.shape), "data": content}


def post_msgpack(http, path, body):
    headers = {"content-type": "application/msgpack"}
    return http.post(path, content=msgspec.msgpack.encode(body), headers=headers)


def bucket_of(tensors):
    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    metadata = [
        {
            "name": meta.name,
            "shape": list(meta.shape),
            "dtype": str(meta.dtype),
            "start_idx": meta.start_idx,
            "end_idx": meta.end_idx,
            "numel": meta.numel,
        }
        for meta in bucket.get_metadata()
    ]
    return raw(bucket.get_flattened_tensor()), metadata


def check_serves(http, tensors, label):
    assert http.get("/weights_fingerprint").json()["fingerprint"] == fingerprint(tensors.items())
    assert http.get("/get_weight_version").json()["weight_version"] == label
    meta = http.post("/generate", json=ASK).json()["meta_info"]
    assert [span["version"] for span in meta["weight_versions"]] == [label]


def test_tensors_as_bytes_become_the_next_version(http, other):
    _, tensors = other
    records = [record(name, tensor) for name, tensor in tensors.items()]
    body = {"tensors": records, "weight_version": "17"}
    reply = post_msgpack(http, "/update_weights_from_tensor", body)
    assert reply.status_code == 200 and reply.json()["success"] is True
    assert reply.json()["num_tensors"] == len(tensors)
    check_serves(http, tensors, "17")


def test_tensors_in_json_are_base64(http, other):
    _, tensors = other
    records = [
        record(name, tensor, base64.b64encode(raw(tensor)).decode())
        for name, tensor in tensors.items()
    ]
    reply = http.post("/update_weights_from_tensor", json={"tensors": records, "weight_version": 3})
    assert reply.status_code == 200, reply.text
    check_serves(http, tensors, "3")


def test_a_flattened_bucket_is_read_and_an_empty_one_is_welcome_in_a_session(http, other):
    _, tensors = other
    names = list(tensors)
    assert http.post("/begin_weight_update", json={"weight_version": "s"}).status_code == 200
    for part in (names[: len(names) // 2], names[len(names) // 2 :], []):
        content, metadata = bucket_of({name: tensors[name] for name in part})
        body = {
            "flattened_tensor": content,
            "metadata": metadata,
            "load_format": "flattened_bucket",
        }
        reply = post_msgpack(http, "/update_weights_from_tensor", body)
        assert reply.status_code == 200, reply.text
    assert http.get("/get_weight_version").json()["weight_version"] != "s"
    assert http.post("/end_weight_update").json()["success"] is True
    check_serves(http, tensors, "s")


@pytest.fixture
def segment():
    """`segment(bytes)`: the name of shared memory with this content."""
    made = []

    def make(content):
        path = Path("/dev/shm") / f"rollout-test-{uuid.uuid4().hex}"
        path.write_bytes(content)
        made.append(path)
        return path.name

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def test_bytes_in_shared_memory_are_read_where_they_lie(http, other, segment):
    _, tensors = other
    content, metadata = bucket_of(tensors)
    place = {"shm": segment(b"12345" + content), "offset": 5, "num_bytes": len(content)}
    body = {"flattened_tensor": place, "metadata": metadata, "weight_version": "shm"}
    reply = http.post("/update_weights_from_tensor", json=body)
    assert reply.status_code == 200, reply.text
    check_serves(http, tensors, "shm")


def test_a_folder_becomes_the_next_version_and_a_bad_one_changes_nothing(http, other, tmp_path):
    folder, tensors = other
    body = {"model_path": str(folder), "weight_version": "disk"}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
    check_serves(http, tensors, "disk")
    assert http.get("/model_info").json()["model_path"] == str(folder)
    reply = http.post("/update_weights_from_disk", json={"model_path": str(tmp_path)})
    assert reply.status_code == 400 and reply.json()["success"] is False
    check_serves(http, tensors, "disk")
    assert http.get("/model_info").json()["model_path"] == str(folder)


NORM = "model.norm.weight"


def norm(value=1.0, **changes):
    return {**record(NORM, torch.full((64,), value)), **changes}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "tensors"),
        ({"tensors": []}, "no tensors"),
        ({"tensors": [norm(name="model.nrom.weight")]}, "model.nrom.weight"),
        ({"tensors": [norm(shape=[32, 2])]}, NORM),
        ({"tensors": [norm(shape=[63])]}, "bytes"),
        ({"tensors": [norm(dtype="float17")]}, "float17"),
        ({"tensors": [norm(value=float("nan"))]}, "NaN"),
        ({"tensors": [norm(), norm()]}, NORM),
        ({"tensors": [norm()], "load_format": "strange"}, "load_format"),
        ({"tensors": [norm()], "keep_pause": True}, "keep_pause"),
        ({"tensors": [norm()], "flsh_cache": True}, "flush_cache"),
        ({"tensors": [norm(data={"shm": "../etc/passwd", "num_bytes": 9})]}, "shm"),
        ({"tensors": [norm(data={"shm": "no-such-segment", "num_bytes": 9})]}, "shm"),
        ({"flattened_tensor": b"1234", "metadata": [{"name": NORM}]}, "metadata"),
        (
            {
                "flattened_tensor": b"1234",
                "metadata": [
                    {
                        "name": NORM,
                        "shape": [64],
                        "dtype": "float32",
                        "start_idx": 0,
                        "end_idx": 256,
                        "numel": 64,
                    }
                ],
            },
            NORM,
        ),
    ],
)
def test_a_bad_update_is_refused_with_400_and_names_what_is_wrong(http, body, word):
    before = http.get("/weights_fingerprint").json()
    reply = post_msgpack(http, "/update_weights_from_tensor", body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["success"] is False and word in reply.json()["message"]
    assert http.get("/weights_fingerprint").json() == before
    assert len(http.post("/generate", json=ASK).json()["output_ids"]) == 8


@pytest.mark.parametrize("shape", [[0, 1 << 61], [0, 1 << 61, 1 << 61]])
def test_a_shape_that_no_tensor_can_have_is_refused(http, shape):
    body = {"tensors": [norm(shape=shape, data=b"")]}
    reply = post_msgpack(http, "/update_weights_from_tensor", body)
    assert reply.status_code == 400 and NORM in reply.json()["message"]


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "/dev/zero", "/proc/1/mem"])
def test_a_path_that_is_no_folder_is_refused(http, path):
    reply = http.post("/update_weights_from_disk", json={"model_path": path})
    assert reply.status_code == 400 and len(reply.json()["message"]) < 1000


@pytest.mark.parametrize("port", [0, -1, 65536, "9" * 30, "²", "1e3", ""])
def test_a_port_that_is_none_is_refused(http, port):
    body = {
        "master_address": "127.0.0.1",
        "master_port": port,
        "rank_offset": 1,
        "world_size": 2,
        "backend": "gloo",
    }
    reply = http.post("/init_weights_update_group", json=body)
    assert reply.status_code == 400 and "master_port" in reply.json()["message"]


@pytest.mark.parametrize("lease_s", [0, -1, 1e9, float("nan"), float("inf")])
def test_a_pause_for_ever_is_refused(http, lease_s):
    reply = post_msgpack(http, "/pause_generation", {"mode": "in_place", "lease_s": lease_s})
    assert reply.status_code == 400 and "lease_s" in reply.json()["message"]


def test_a_session_whose_trainer_says_nothing_more_does_not_keep_others_out(serve, folder, until):
    server = serve(request_timeout_s=4.0)
    with httpx.Client(base_url=server.url, timeout=60) as other:
        other.post("/begin_weight_update", json={"weight_version": "dead"}).raise_for_status()
        assert other.post("/begin_weight_update", json={}).status_code == 400
        until(
            "another one may begin",
            lambda: other.post("/begin_weight_update", json={}).is_success,
            60,
        )
        assert other.post("/abort_weight_update").is_success


def test_shared_memory_that_is_shorter_than_it_says_is_refused(http, segment):
    place = {"shm": segment(b"1234"), "num_bytes": 256}
    reply = post_msgpack(http, "/update_weights_from_tensor", {"tensors": [norm(data=place)]})
    assert reply.status_code == 400 and "256" in reply.json()["message"]


def test_a_link_in_shared_memory_is_not_followed(http, tmp_path):
    path = Path("/dev/shm") / f"rollout-test-{uuid.uuid4().hex}"
    (tmp_path / "secret").write_bytes(b"x" * 256)
    path.symlink_to(tmp_path / "secret")
    try:
        place = {"shm": path.name, "num_bytes": 256}
        reply = post_msgpack(http, "/update_weights_from_tensor", {"tensors": [norm(data=place)]})
    finally:
        path.unlink()
    assert reply.status_code == 400 and "shm" in reply.json()["message"]


def test_what_trainers_send_as_harmless_is_taken(http):
    body = {"tensors": [norm(0.5)], "abort_all_requests": False, "torch_empty_cache": True}
    assert post_msgpack(http, "/update_weights_from_tensor", body).status_code == 200
    found = http.get("/get_weights_by_name", params={"name": NORM, "truncate_size": 3}).json()
    assert found == [0.5] * 3
    found = http.post("/get_weights_by_name", json={"name": NORM, "truncate_size": 2}).json()
    assert found == [0.5] * 2
    assert http.post("/get_weights_by_name", json={"name": "nobody"}).status_code == 400


def test_an_aborted_session_leaves_the_old_version(http, other):
    _, tensors = other
    before = http.get("/weights_fingerprint").json()
    http.post("/begin_weight_update", json={}).raise_for_status()
    assert http.post("/begin_weight_update", json={}).status_code == 400
    content, metadata = bucket_of(tensors)
    body = {"flattened_tensor": content, "metadata": metadata}
    assert post_msgpack(http, "/update_weights_from_tensor", body).status_code == 200
    assert http.post("/abort_weight_update").json()["success"] is True
    assert http.get("/weights_fingerprint").json() == before
    assert http.post("/end_weight_update").status_code == 400


@pytest.mark.parametrize("case", ["model", "model bucket"])
def test_what_trainers_of_other_makes_serialize_becomes_the_next_version(http, folder, case):
    sender = Sender()
    try:
        body = {
            "serialized_named_tensors": sender.payloads(case, folder, 3),
            "load_format": "flattened_bucket" if case == "model bucket" else None,
            "flush_cache": False,
            "abort_all_requests": False,
            "weight_version": "17",
        }
        reply = http.post("/update_weights_from_tensor", json=body)
    finally:
        sender.close()
    assert reply.status_code == 200, reply.text
    check_serves(http, dict(model_of(folder, 3).named_parameters()), "17")


def test_a_pickle_that_would_run_something_is_refused_and_not_run(http, tmp_path):
    witness = tmp_path / "witness"
    hostile = b"cos\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR."
    body = {"serialized_named_tensors": [base64.b64encode(hostile).decode()]}
    reply = http.post("/update_weights_from_tensor", json=body)
    assert reply.status_code == 400 and reply.json()["success"] is False
    assert not witness.exists()


def check(http, action):
    return http.post("/weights_checker", json={"action": action})


def test_a_word_that_is_none_of_a_few_is_answered_with_those(http):
    reply = check(http, "bogus")
    assert reply.status_code == 400
    assert "'bogus' - at `$.action`: expected one of 'snapshot', 'reset'," in reply.text


def test_the_checker_finds_what_an_update_does_not_bring(http, folder, other):
    _, tensors = other
    first = check(http, "checksum").json()
    assert first["checksum"] == http.get("/weights_fingerprint").json()["hex"]
    assert set(first["checksums"]) == set(tensors)
    assert check(http, "snapshot").json()["num_tensors"] == len(tensors)
    assert check(http, "compare").status_code == 200
    post_msgpack(http, "/update_weights_from_tensor", {"tensors": [norm(0.25)]}).raise_for_status()
    reply = check(http, "compare")
    assert reply.status_code == 400 and f"1 of {len(tensors)} tensors" in reply.json()["message"]
    assert NORM in reply.json()["message"]
    assert check(http, "reset").json()["success"] is True
    assert http.post("/generate", json=ASK).status_code == 503
    reply = check(http, "compare").json()["message"]
    assert f"{len(tensors)} of {len(tensors)} tensors" in reply and reply.endswith(", ...")
    http.post("/update_weights_from_disk", json={"model_path": str(folder)}).raise_for_status()
    assert check(http, "compare").status_code == 200
    assert check(http, "checksum").json()["checksums"] == first["checksums"]


def test_the_weights_that_serve_get_another_label(http):
    before = http.get("/weights_fingerprint").json()
    answer = http.post("/update_weight_version", json={"new_version": 99}).json()
    assert answer["success"] is True and answer["new_version"] == "99"
    assert http.get("/get_weight_version").json()["weight_version"] == "99"
    meta = http.post("/generate", json=ASK).json()["meta_info"]
    assert [span["version"] for span in meta["weight_versions"]] == ["99"]
    assert http.get("/weights_fingerprint").json() == before
    for body in ({}, {"new_version": ""}, {"new_version": "x" * 600}, {"new_version": ["a"]}):
        assert http.post("/update_weight_version", json=body).status_code == 400


def test_a_new_label_may_end_what_runs(http, until):
    http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    found = []
    thread = threading.Thread(target=lambda: found.append(http.post("/generate", json=ASK).json()))
    thread.start()
    try:
        until("it is there", lambda: http.get("/get_load").json()[0]["num_reqs"] == 1)
        body = {"new_version": "later", "abort_all_requests": True}
        http.post("/update_weight_version", json=body).raise_for_status()
        thread.join(60)
    finally:
        http.post("/continue_generation", json={})
    assert found[0]["meta_info"]["finish_reason"]["type"] == "abort"


def test_an_engine_is_slowed_down_and_its_limits_are_changed(http):
    body = {"forward_sleep_time": 0.05}
    assert http.post("/slow_down", json=body).json()["success"] is True
    start = time.monotonic()
    http.post("/generate", json=ASK).raise_for_status()
    assert time.monotonic() - start >= 8 * 0.05
    http.post("/slow_down", json={"forward_sleep_time": None}).raise_for_status()
    assert http.post("/slow_down", json={"forward_sleep_time": 1e9}).status_code == 400
    before = http.get("/server_info").json()["max_running_requests"]
    body = {"server_args": {"max_running_requests": 3}}
    assert http.post("/set_internal_state", json=body).json()["updated"] is True
    assert http.get("/server_info").json()["max_running_requests"] == 3
    body = {"server_args": {"max_running_requests": before}}
    http.post("/set_internal_state", json=body).raise_for_status()
    reply = http.post("/set_internal_state", json={"server_args": {"tp_size": 2}})
    assert reply.status_code == 400 and "tp_size" in reply.json()["message"]


def test_requests_run_through_an_update_and_tell_their_versions(http, other, until):
    folder, _ = other
    answers = []
    http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    long = {**ASK, "sampling_params": {**ASK["sampling_params"], "max_new_tokens": 60}}
    body = {**long, "stream": True}
    first = threading.Event()

    def ask():
        with http.stream("POST", "/generate", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    answers.append(msgspec.json.decode(line.removeprefix("data: ")))
                    first.set()

    http.post("/continue_generation", json={}).raise_for_status()
    http.post("/slow_down", json={"forward_sleep_time": 0.1}).raise_for_status()
    thread = threading.Thread(target=ask)
    thread.start()
    assert first.wait(60)
    http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    http.post("/slow_down", json={"forward_sleep_time": 0}).raise_for_status()
    half = len(answers)
    update = {"model_path": str(folder), "weight_version": "mid", "flush_cache": False}
    http.post("/update_weights_from_disk", json=update).raise_for_status()
    http.post("/continue_generation", json={}).raise_for_status()
    thread.join(120)
    last = answers[-1]["meta_info"]
    spans = last["weight_versions"]
    assert last["completion_tokens"] == 60 and half < 60
    assert spans[-1]["end"] == 60 and spans[0]["start"] == 0
    if len(spans) > 1:  # Unless all had been drawn before the pause.
        assert [span["version"] for span in spans][-1] == "mid"
        assert spans[0]["end"] == spans[1]["start"]


def test_memory_is_released_and_resumed_with_a_json_body(http):
    reply = http.post("/release_memory_occupation", json={"tags": ["kv_cache"]})
    assert reply.json()["tags"] == ["kv_cache"] and reply.json()["num_bytes"] > 0
    reply = http.post("/resume_memory_occupation", json={"tags": "kv_cache"})
    assert reply.json()["tags"] == ["kv_cache"]
    assert http.post("/release_memory_occupation", json={"tags": ["nothing"]}).status_code == 400


def test_the_cache_is_flushed_by_both_methods_and_not_under_requests(http, until):
    assert http.get("/flush_cache").status_code == http.post("/flush_cache").status_code == 200
    http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    thread = threading.Thread(target=lambda: http.post("/generate", json=ASK))
    thread.start()
    try:
        until("it is there", lambda: http.get("/get_load").json()[0]["num_reqs"] == 1)
        reply = http.post("/flush_cache")
        assert reply.status_code == 400 and reply.json()["success"] is False
    finally:
        http.post("/continue_generation", json={})
        thread.join(60)


@pytest.mark.parametrize("in_session", [False, True])
def test_a_torch_distributed_trainer_broadcasts_to_the_server(http, other, in_session):
    """The sequence of a disaggregated trainer: the call is under way before the broadcast."""
    _, tensors = other
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    name = f"group-{in_session}"
    join = {
        "master_address": "127.0.0.1",
        "master_port": str(store.port),
        "rank_offset": 1,
        "world_size": 2,
        "group_name": name,
        "backend": "gloo",
    }
    announced = {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype) for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": name,
        "weight_version": None if in_session else "42",
        "fingerprint": fingerprint(tensors),
    }
    with ThreadPoolExecutor() as background:
        joining = background.submit(http.post, "/init_weights_update_group", json=join)
        prefixed = dist.PrefixStore(name, store)
        group = dist.ProcessGroupGloo(prefixed, 0, 2, timedelta(seconds=60))
        assert joining.result().json()["success"] is True
        if in_session:
            http.post("/begin_weight_update", json={"weight_version": 42}).raise_for_status()
        taken = background.submit(http.post, "/update_weights_from_distributed", json=announced)
        for tensor in tensors.values():
            group.broadcast(tensor.detach().contiguous(), 0).wait()
        assert taken.result().json()["success"] is True, taken.result().text
        if in_session:
            http.post("/end_weight_update").raise_for_status()
        check_serves(http, tensors, "42")
        if in_session:  # What was sent is something else: the group is left.
            wrong = {**announced, "fingerprint": announced["fingerprint"] ^ 1}
            taken = background.submit(http.post, "/update_weights_from_distributed", json=wrong)
            for tensor in tensors.values():
                group.broadcast(tensor.detach().contiguous(), 0).wait()
            assert taken.result().status_code == 400
            assert "got fingerprint" in taken.result().json()["message"]
            return
    left = http.post("/destroy_weights_update_group", json={"group_name": name})
    assert left.json()["success"] is True
    left = http.post("/destroy_weights_update_group", json={"group_name": name})
    assert left.status_code == 400 and left.json()["success"] is False
