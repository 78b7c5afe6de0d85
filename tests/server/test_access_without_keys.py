"""A server without keys is for programs of this machine, and not for web pages that are open on it."""

import pytest

SHORT = {"max_new_tokens": 2, "ignore_eos": True}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example"])
def test_a_name_that_leads_here_from_outside_is_refused(http, host):
    assert http.get("/server_info", headers={"Host": host}).status_code == 403


def test_a_page_of_another_origin_is_refused(http, server):
    body = {"input_ids": [1], "sampling_params": SHORT}
    for origin in ("http://evil.example", "null"):
        reply = http.post("/generate", json=body, headers={"Origin": origin})
        assert reply.status_code == 403
    assert http.post("/generate", json=body, headers={"Origin": server.url}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:99", "127.0.0.1", "[::1]:80"])
def test_names_of_this_machine_are_welcome(http, host):
    assert http.get("/server_info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_cannot_do_anything_with_an_image_or_a_link(http, site):
    """Those are GETs, and browsers say nothing of the page's origin with them."""
    headers = {"Sec-Fetch-Site": site}
    for path in ("/flush_cache", "/release_memory_occupation", "/stop_profile", "/server_info"):
        assert http.get(path, headers=headers).status_code == 403
    assert http.get("/dashboard", headers=headers).status_code == 200
    for own in ("same-origin", "none"):
        assert http.get("/server_info", headers={"Sec-Fetch-Site": own}).status_code == 200
