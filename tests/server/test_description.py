"""Whatever the OpenAPI description allows, and what it does not: no answer is a server's error."""

import shutil
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = 12
UNSETTLING = (
    *("/pause", "/pause_generation", "/sleep", "/release_memory_occupation", "/slow_down"),
    *("/start_profile", "/stop_profile", "/weights_checker", "/begin_weight_update"),
    *(
        "/init_weights_update_group",
        "/update_weights_from_distributed",
        "/update_weights_from_tensor",
    ),
)
"""Each of these may stop what the others need: the server is set right again after every call of them."""
PATIENCE = {"request_timeout_s": 10.0, "progress_timeout_s": 5.0}
"""Of the engine: what waits here for a trainer or a later version waits in vain."""


@pytest.fixture(scope="module")
def server(serve):
    return serve({"max_call_tokens": 4000}, **PATIENCE)


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


@pytest.fixture
def set_right(http, folder):
    def act():
        http.post("/slow_down", json={"forward_sleep_time": 0})
        http.post("/continue_generation", json={})
        http.post("/abort_weight_update")
        http.post("/resume_memory_occupation", json={})
        path = http.post("/stop_profile").json().get("path")
        if path is not None:
            shutil.rmtree(Path(path).parent)
        if http.get("/health_generate").status_code == 503:
            body = {"model_path": str(folder)}
            http.post("/update_weights_from_disk", json=body).raise_for_status()
        assert http.get("/health_generate").status_code == 200

    return act


def test_no_request_that_can_be_made_of_it_gets_a_5xx(operations, server, set_right):
    counts, failures = {}, []

    def ask(case):
        unsettles = case.path in UNSETTLING
        allowed = {501} | (_LATE if unsettles or waits(case.body) else set())
        reply = case.call(base_url=server.url, timeout=120)
        counts[case.path] = counts.get(case.path, 0) + 1
        status = reply.status_code
        if status == 422 or (status >= 500 and status not in allowed):
            failures.append((status, case.method, case.path, str(case.body)[:300], reply.text))
        if unsettles:
            set_right()

    for operation in operations:
        few = operation.path == "/init_weights_update_group"
        check = given(case=operation.as_strategy())(ask)
        settings(
            max_examples=4 if few else EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(check)()
    assert failures == []
    assert counts.keys() == {operation.path for operation in operations}
    assert sum(counts.values()) > 2 * len(operations) > 120


_LATE = {503, 504}


def waits(body):
    """It asks for a version that may never come, or for an answer sooner than there can be one."""
    return isinstance(body, dict) and not {"min_weight_version", "timeout_s"}.isdisjoint(body)
