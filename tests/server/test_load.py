"""200 streaming clients, a fifth of which vanish, and updates meanwhile: nothing is lost, leaks or is mislabelled."""

import asyncio
import contextlib
import itertools
import random
import time
from pathlib import Path

import httpx
import msgspec
import pytest
import torch

from rollout_benchmarks.http_client import HttpConnection

NUM_CLIENTS = 200
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def server(serve):
    return serve(kv_cache_bytes=64 << 20)


def descriptors(server):
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def resident_bytes(server):
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


class Load:
    """Clients that ask again and again until `end`, and a trainer beside them."""

    def __init__(self, url, seconds, seed):
        self.url, self.seed = url, seed
        self.end = time.monotonic() + seconds
        self.finished = []
        self.num_vanished = self.num_asked = 0
        self.labels = ["0"]

    async def run(self):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.trainer())
            for number in range(NUM_CLIENTS):
                tasks.create_task(self.client(number))

    async def client(self, number):
        rng = random.Random(self.seed * 1000 + number)
        vanishes = number % 5 == 0
        while time.monotonic() < self.end:
            body = {
                "input_ids": [rng.randrange(256) for _ in range(rng.randint(1, 40))],
                "sampling_params": {
                    "max_new_tokens": rng.randint(4, 24),
                    "ignore_eos": True,
                    "n": rng.choice((1, 1, 1, 2)),
                },
                "rid": "the same for all",
                "stream": True,
            }
            self.num_asked += 1
            async with HttpConnection(self.url) as line:
                await self.read(line, body, rng.randint(1, 5) if vanishes else None)

    async def read(self, line, body, vanish_after):
        last, count = {}, 0
        async with contextlib.aclosing(line.events("/generate", body)) as events:
            async for event in events:
                chunk = msgspec.json.decode(event)
                assert "error" not in chunk, chunk
                last[chunk.get("index", 0)] = chunk
                count += 1
                if vanish_after is not None and count >= vanish_after:
                    self.num_vanished += 1
                    line.vanish()
                    return
        assert len(last) == body["sampling_params"]["n"], "a sample is missing"
        for result in last.values():
            self.check(result, body)
        self.finished.append(len(last))

    def check(self, result, body):
        meta, wanted = result["meta_info"], body["sampling_params"]["max_new_tokens"]
        assert meta["finish_reason"] == {"type": "length", "length": wanted}
        assert len(result["output_ids"]) == wanted == meta["completion_tokens"]
        spans = meta["weight_versions"]
        assert spans[0]["start"] == 0 and spans[-1]["end"] == wanted
        for before, after in itertools.pairwise(spans):
            assert before["end"] == after["start"] and before["number"] < after["number"]
        for span in spans:
            assert span["start"] < span["end"] and span["version"] == self.labels[span["number"]]

    async def trainer(self):
        generator = torch.Generator().manual_seed(self.seed)
        async with HttpConnection(self.url) as line:
            while time.monotonic() < self.end or len(self.labels) < 4:
                value = 1 + 0.1 * torch.rand(64, generator=generator)
                label = f"step {len(self.labels)}"
                self.labels.append(label)  # Before a token of it can be seen.
                record = {
                    "name": NORM,
                    "dtype": "float32",
                    "shape": [64],
                    "data": value.numpy().tobytes(),
                }
                body = {"tensors": [record], "weight_version": label, "flush_cache": False}
                answer = await line.post("/update_weights_from_tensor", body)
                assert answer["success"] is True
                assert answer["weight_version_number"] == len(self.labels) - 1
                await asyncio.sleep(0.3)


def put_under_load(http, server, until, seconds):
    assert http.get("/get_weight_version").json()["weight_version_number"] == 0
    load = Load(server.url, seconds, seed=2)
    before, size = descriptors(server), resident_bytes(server)
    asyncio.run(load.run())
    until("every request has ended", lambda: http.get("/get_load").json()[0]["num_reqs"] == 0)
    http.post("/flush_cache").raise_for_status()
    assert http.get("/get_load").json()[0]["num_tokens"] == 0, "blocks leaked"
    until("connections are closed", lambda: descriptors(server) <= before + 8)
    assert resident_bytes(server) < size + (96 << 20)
    assert load.num_vanished and len(load.labels) > 2
    assert len(load.finished) + load.num_vanished == load.num_asked, "a request was lost"
    assert http.get("/health_generate").status_code == 200
    return load


def test_two_hundred_clients_and_a_trainer(http, server, until):
    load = put_under_load(http, server, until, seconds=20.0)
    assert len(load.finished) >= 160


@pytest.mark.load
@pytest.mark.timeout(900)
def test_two_hundred_clients_and_a_trainer_for_five_minutes(serve, until):
    server = serve(kv_cache_bytes=64 << 20)
    with httpx.Client(base_url=server.url, timeout=120.0) as http:
        load = put_under_load(http, server, until, seconds=300.0)
    assert len(load.finished) >= 1000
