"""The page that shows what a server does: its numbers, and what a browser makes of them."""

import re
import shutil
import subprocess
from importlib import resources

import httpx
import pytest

ASK = {
    "input_ids": [[5, 6, 7], [8, 9]],
    "sampling_params": {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True},
}


def generate_and_update(http, folder, label):
    """Two samples before an update from disk, and two after it."""
    http.post("/generate", json=ASK).raise_for_status()
    body = {"model_path": str(folder), "weight_version": label}
    http.post("/update_weights_from_disk", json=body).raise_for_status()
    http.post("/generate", json=ASK).raise_for_status()


def test_the_data_tell_samples_with_their_versions_and_updates_with_their_phases(http, folder):
    first = http.get("/dashboard/data").json()
    generate_and_update(http, folder, "step 1")
    data = http.get("/dashboard/data", params={"since": first["now"]}).json()
    assert data["weight_version"] == "step 1" and data["version"] == first["version"] + 1
    assert len(data["requests"]) == 4
    assert [r["versions"] for r in data["requests"]] == [
        *[[[first["version"], 0, 8]]] * 2,
        *[[[data["version"], 0, 8]]] * 2,
    ]
    [sync] = data["syncs"]
    assert sync["label"] == "step 1" and sync["version"] == data["version"]
    assert set(sync["phases"]) == {"pack", "stage", "copy", "verify", "pause", "total"}
    assert all(r["began"] < r["ended"] for r in data["requests"])
    assert 0 <= data["kv_use"] <= 1
    # First tokens come with the prompts' last steps.
    assert data["num_decoded_tokens"] - first["num_decoded_tokens"] == 4 * 7
    later = http.get("/dashboard/data", params={"since": data["now"]}).json()
    assert (later["requests"], later["syncs"]) == ([], [])


def test_the_page_has_nothing_from_elsewhere_and_may_load_nothing(http):
    answer = http.get("/dashboard")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    page = answer.text
    assert page == resources.files("rollout.server").joinpath("dashboard.html").read_text()
    assert not re.search(r"https?:|//[a-z]+\.|<link|<img|\bimport\b|innerHTML|eval\(", page)


def test_with_a_key_the_page_is_open_and_the_numbers_are_not(serve):
    server = serve({"api_keys": ["secret"]})
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        assert client.get("/dashboard").status_code == 200
        assert client.get("/dashboard/data").status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert client.get("/dashboard/data", headers=headers).status_code == 200


# ---- in a browser ----------------------------------------------------------------------------------------------------


def browse(url, profile, *options):
    """What Chromium says after ten seconds of its own time."""
    chromium = shutil.which("chromium")
    assert chromium, "no chromium here: apt-get install chromium, or leave out -m browser"
    ended = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={profile}", "--window-size=1200,900"),
            *("--virtual-time-budget=10000", *options, url),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.browser
def test_a_browser_draws_samples_and_updates(http, folder, server, tmp_path):
    generate_and_update(http, folder, "<b>step</b> 2")
    page = browse(f"{server.url}/dashboard", tmp_path / "profile", "--dump-dom")
    drawn = {name: int(value) for name, value in re.findall(r'data-(\w+)="(\d+)"', page)}
    assert drawn["requests"] >= 4 and drawn["syncs"] >= 1 and drawn["drawn"] >= 4
    assert ">serving<" in page and "version " in page
    # A trainer's label is text, whatever it looks like.
    assert "&lt;b&gt;step&lt;/b&gt; 2" in page
    browse(f"{server.url}/dashboard", tmp_path / "profile", f"--screenshot={tmp_path}/page.png")
    picture = (tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.browser
def test_a_browser_without_the_key_is_told_so_and_with_it_sees_the_numbers(serve, tmp_path):
    server = serve({"api_keys": ["secret"]})
    page = browse(f"{server.url}/dashboard", tmp_path / "profile", "--dump-dom")
    assert "this server wants a key" in page
    page = browse(f"{server.url}/dashboard#key=secret", tmp_path / "profile", "--dump-dom")
    assert ">serving<" in page
