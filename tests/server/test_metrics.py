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


def read(http):
    found = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
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
