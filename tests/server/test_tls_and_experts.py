"""TLS as uvicorn does it; and what else has to survive the way through JSON."""

import ssl

import httpx
import numpy as np
import pytest

from rollout import Engine
from rollout.server import HttpServerEngineAdapter, launch_server_process

# Of nobody: made for this test alone.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCpkWwlcV26q2E+oF
/Xn1/2uDiP6K9kCYXfla4VS2Yp2hRANCAARD4KXsYyyi8DTrr/T+76RQHsPOmBo9
oeWybXh1YiASzSwic60OZYRbIO7AkaKCVSu/tBWCECJ/vhWmW8N+IEzc
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUZ78eayHo2nl9VUeGnh6AmNxwAlUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTA2MzE1MloYDzIxMjYxMTA1
MDYzMTUyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARD4KXsYyyi8DTrr/T+76RQHsPOmBo9oeWybXh1YiASzSwic60OZYRb
IO7AkaKCVSu/tBWCECJ/vhWmW8N+IEzco28wbTAdBgNVHQ4EFgQUNMuXtXirA1v7
j3ITrDmcmxZdJF4wHwYDVR0jBBgwFoAUNMuXtXirA1v7j3ITrDmcmxZdJF4wDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgI6AEsN9Kxk8L1rXXgg63LAqRrORcDFF2XVaeubGpX7ICIQDu
3XoTmWjaBTTOEz0+QGeSvcJtkER0ATSjuSvKfqXrLw==
-----END CERTIFICATE-----
"""
ASK = {
    "input_ids": [[1, 2, 3], [4, 5]],
    "sampling_params": {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True},
    "return_routed_experts": True,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 16}


def test_a_server_with_a_certificate_speaks_tls_alone(serve, tmp_path):
    (tmp_path / "key.pem").write_text(KEY)
    (tmp_path / "certificate.pem").write_text(CERTIFICATE)
    files = {"key": "key.pem", "cert": "certificate.pem"}
    server = serve({f"ssl_{kind}file": str(tmp_path / name) for kind, name in files.items()})
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
    reply = httpx.get(f"{server.url}/health", verify=context, timeout=60)
    assert reply.status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(server.url.replace("https", "http") + "/health", timeout=60)


def test_routed_experts_are_the_engines_own(tiny_checkpoint):
    folder = tiny_checkpoint("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3, **MOE)
    options = {"kv_cache_bytes": 4 << 20, "num_threads": 1, "enable_return_routed_experts": True}
    with Engine(folder, executor="local", **options) as engine:
        expected = engine.generate(**ASK)
        with launch_server_process(address=engine.address, server={"port": 0}) as server:
            with HttpServerEngineAdapter(server.url) as adapter:
                found = adapter.generate(**ASK)
    for result, wanted in zip(found, expected, strict=True):
        got = result["meta_info"]["routed_experts"]
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted["meta_info"]["routed_experts"])
