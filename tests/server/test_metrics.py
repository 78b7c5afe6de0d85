"""`/metrics` counts what has happened."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from rollout import Engine
from rollout.server import launch_server_process


def test_updates_by_a_publisher_at_the_engines_address_are_counted_too(folder, reference_model):
    with Engine(folder, executor="local", kv_cache_bytes=4 << 20, num_threads=1) as engine:
        with launch_server_process(address=engine.address, server={"port": 0}) as server:
            with httpx.Client(base_url=server.url, timeout=60.0) as http:
                before = read(http)
                engine.publish(reference_model(folder))
                engine.publish(reference_model(folder))
                after, again = read(http), read(http)
    committed = ("rollout_weight_updates_total", "committed")
    assert after[committed] == before[committed] + 2 == again[committed]
    assert after[("rollout_weight_update_seconds_count", "pause")] == 2


KINDS = {
    "requests": "counter",
    "prompt_tokens": "counter",
    "cached_tokens": "counter",
    "generation_tokens": "counter",
    "engine_decoded_tokens": "counter",
    "engine_prompt_tokens": "counter",
    "request_seconds": "histogram",
    "token_seconds": "histogram",
    "step_seconds": "histogram",
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "samples_in_flight": "gauge",
    "kv_usage": "gauge",
    "weight_version_number": "gauge",
    "weight_updates": "counter",
    "weight_update_bytes": "counter",
    "weight_update_seconds": "histogram",
    "paused": "gauge",
    "torn": "gauge",
    "up": "gauge",
}


def families(http):
    return list(text_string_to_metric_families(http.get("/metrics").text))


def test_every_family_has_its_type_and_a_sentence(http):
    found = {family.name: family for family in families(http) if family.type != "unknown"}
    kinds = {name: family.type for name, family in found.items() if not name.endswith("_created")}
    assert kinds == {f"rollout_{name}": kind for name, kind in KINDS.items()}
    assert all(family.documentation for family in found.values())


def test_steps_are_counted_by_how_long_they_took(http):
    before = read(http)
    http.post("/slow_down", json={"forward_sleep_time": 0.04}).raise_for_status()
    params = {"max_new_tokens": 5, "ignore_eos": True}
    http.post("/generate", json={"input_ids": [1, 2, 3], "sampling_params": params})
    http.post("/slow_down", json={"forward_sleep_time": 0}).raise_for_status()
    after = read(http)
    grown = {
        key[1]: after[key] - before[key] for key in after if key[0] == "rollout_step_seconds_bucket"
    }
    assert grown["0.03"] == 0 and grown["+Inf"] == 5
    key = ("rollout_step_seconds_count",)
    assert after[key] - before[key] == 5
    key = ("rollout_step_seconds_sum",)
    assert after[key] - before[key] >= 5 * 0.04


def test_of_an_engine_that_is_gone_nothing_old_is_shown(folder):
    with Engine(folder, executor="local", kv_cache_bytes=4 << 20, num_threads=1) as engine:
        with launch_server_process(address=engine.address, server={"port": 0}) as server:
            with httpx.Client(base_url=server.url, timeout=60.0) as http:
                assert read(http)[("rollout_up",)] == 1
                engine.shutdown()
                found = read(http)
    assert found[("rollout_up",)] == 0 and ("rollout_requests_running",) not in found


def read(http):
    found = {}
    for family in families(http):
        for sample in family.samples:
            found[(sample.name, *sorted(sample.labels.values()))] = sample.value
    return found


def test_requests_tokens_and_updates_are_counted(http, folder):
    before = read(http)
    params = {"max_new_tokens": 4, "ignore_eos": True, "n": 2}
    http.post("/generate", json={"input_ids": [1, 2, 3], "sampling_params": params})
    http.post("/update_weights_from_disk", json={"model_path": str(folder)}).raise_for_status()
    assert http.post("/update_weights_from_disk", json={"model_path": "/none"}).status_code == 400
    after = read(http)

    def grown(*key):
        return after[key] - before.get(key, 0.0)

    assert grown("rollout_requests_total", "length") == 2
    assert grown("rollout_generation_tokens_total") == 8
    assert grown("rollout_request_seconds_count") == 2
    assert grown("rollout_weight_updates_total", "committed") == 1
    assert grown("rollout_weight_updates_total", "refused") == 1
    for phase in ("pack", "stage", "copy", "verify", "pause", "total"):
        assert grown("rollout_weight_update_seconds_count", phase) == 1
    assert (
        after[("rollout_weight_version_number",)] == before[("rollout_weight_version_number",)] + 1
    )
    assert after[("rollout_up",)] == 1 and after[("rollout_samples_in_flight",)] == 0
    assert 0 <= after[("rollout_kv_usage",)] <= 1
