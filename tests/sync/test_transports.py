"""One conformance suite for all ways of the bytes: in and between processes, through memory, a group, or by disk."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ipc_stand_in import stand_in
from sync_support import (
    ToyEngine,
    arenas_mapped,
    eventually,
    num_descriptors,
    one_by_one,
    read_line,
    weights,
)

import weight_sync
from weight_sync import ManifestMismatch, SyncReport, WeightPublisher
from weight_sync.receiver import service


class Link:
    """A publisher, and how to see what its engine holds."""

    def __init__(self, engine: Any, state: Callable[[], dict[str, Any]], **options: Any) -> None:
        self.engine, self.state, self.options = engine, state, options
        self.publisher = WeightPublisher(engine, timeout_s=20, **options)

    def publish(self, tensors: dict[str, torch.Tensor], **options: Any) -> SyncReport:
        return self.publisher.publish(tensors, **options)


class DiskLink(Link):
    """Every update takes the way through a folder."""

    folder: Path
    count = 0

    def publish(self, tensors: dict[str, torch.Tensor], **options: Any) -> SyncReport:
        self.count += 1
        written = weight_sync.write_checkpoint(
            self.folder / str(self.count), tensors, label=str(self.count), max_shard_bytes=600
        )
        checkpoint = weight_sync.read_checkpoint(written)
        return self.publisher.publish(
            checkpoint.tensors, expected_fingerprints=checkpoint.fingerprints, **options
        )


def state_of(engine: ToyEngine) -> dict[str, Any]:
    return {
        "version": engine.receiver.version,
        "values": sorted(engine.values()),
        "mixtures": engine.host.mixtures,
    }


@pytest.fixture(scope="module")
def far_engine() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """One engine in another process for the whole module; versions go on from test to test."""
    from sync_support import collect, spawn

    process = spawn("engine_process.py")
    address = read_line(process)

    def state() -> dict[str, Any]:
        assert process.stdin is not None
        process.stdin.write("state\n")
        process.stdin.flush()
        found: dict[str, Any] = json.loads(read_line(process))
        assert not found["moved"]
        return found

    yield address, state
    collect(process)


KINDS = [
    *("local", "shared_memory", "uploaded", "served", "tcp", "other_process"),
    *("cuda_ipc", "cuda_ipc_window"),
    *("disk", "process_group"),
]


@pytest.fixture(params=KINDS)
def make_link(
    request: pytest.FixtureRequest,
    make_engine: Callable[..., ToyEngine],
    tmp_path: Path,
) -> Iterator[Callable[..., Link]]:
    kind = request.param
    links: list[Link] = []
    if kind == "uploaded":  # as for parameters on a GPU
        patch = request.getfixturevalue("monkeypatch")
        patch.setattr(service, "needs_upload", lambda device: True)
    if kind.startswith("cuda_ipc"):
        stand_in(request.getfixturevalue("monkeypatch"))
    if kind in ("other_process", "cuda_ipc", "cuda_ipc_window"):
        target, state = request.getfixturevalue("far_engine")
    else:
        served = kind in ("served", "tcp")
        bind = "tcp://127.0.0.1:0" if kind == "tcp" else None
        engine = make_engine(serve=served, bind=bind)
        target = engine.address if served else engine

        def state() -> dict[str, Any]:
            return state_of(engine)

    def make(**options: Any) -> Link:
        if kind in ("shared_memory", "process_group", "cuda_ipc"):
            options["transport"] = kind
        if kind == "cuda_ipc_window":
            options |= {"transport": "cuda_ipc", "arena_bytes": 2048}
        if kind == "uploaded":
            options["transport"] = "shared_memory"
        link = (DiskLink if kind == "disk" else Link)(target, state, **options)
        if isinstance(link, DiskLink):
            link.folder = tmp_path
        links.append(link)
        return link

    yield make
    for link in links:
        link.publisher.close()
        assert link.state()["mixtures"] == []


def test_the_first_update_arrives_and_its_fingerprint_is_the_trainers(
    make_link: Callable[..., Link],
) -> None:
    link = make_link()
    before = link.state()["version"]
    report = link.publish(weights(1.0), label="first")
    assert link.state()["values"] == [1.0]
    assert link.state()["version"] == report.version == before + 1
    assert report.fingerprint == weight_sync.fingerprint(weights(1.0))
    assert report.fingerprint == link.publisher.fingerprint()


def test_ten_updates_in_a_row_leave_no_descriptor_thread_or_mapping_behind(
    make_link: Callable[..., Link],
) -> None:
    link = make_link()
    link.publish(weights(99.0))
    gc.collect()
    descriptors, mapped = num_descriptors(), arenas_mapped()
    for i in range(10):
        report = link.publish(weights(float(i)), verify=("pause", "overlapped")[i % 2])
        assert link.state()["values"] == [float(i)]
        assert report.updated == 9
    gc.collect()
    assert arenas_mapped() == mapped
    # The engine's thread looks from time to time whether its trainer lives, and opens a file for that moment.
    assert eventually(lambda: num_descriptors() <= descriptors)


def test_closing_returns_to_the_baseline(make_link: Callable[..., Link]) -> None:
    link = make_link()
    link.state()
    gc.collect()
    descriptors, mapped = num_descriptors(), arenas_mapped()
    for i in range(3):
        with WeightPublisher(link.engine, timeout_s=20, **link.options) as publisher:
            publisher.publish(weights(float(i)))
    gc.collect()
    assert eventually(lambda: arenas_mapped() == mapped)
    assert eventually(lambda: num_descriptors() <= descriptors)


@pytest.mark.parametrize("bucket_bytes", [1, 300, 1000])
def test_bucket_boundaries_never_matter(make_link: Callable[..., Link], bucket_bytes: int) -> None:
    link = make_link(bucket_bytes=bucket_bytes)
    for i, form in enumerate((dict, one_by_one)):
        report = link.publisher.publish(form(weights(5.0 + i)))
        assert link.state()["values"] == [5.0 + i]
        assert report.fingerprint == weight_sync.fingerprint(weights(5.0 + i))


def test_a_bad_update_is_refused_and_the_next_one_succeeds(make_link: Callable[..., Link]) -> None:
    link = make_link()
    link.publish(weights(1.0))
    version = link.state()["version"]
    for bad in (
        {"unknown.weight": torch.zeros(2)},
        {"norm.weight": torch.zeros(8, dtype=torch.bfloat16)},
    ):
        with pytest.raises(ManifestMismatch):
            link.publish(weights(2.0) | bad)
    missing = weights(2.0)
    del missing["norm.weight"]
    with pytest.raises(ManifestMismatch, match=r"norm.weight.*: missing"):
        link.publish(missing)
    assert link.state()["values"] == [1.0] and link.state()["version"] == version
    assert link.publish(weights(3.0)).version == version + 1
    assert link.state()["values"] == [3.0]


def test_the_trainer_may_change_its_tensors_once_the_call_has_returned(
    make_link: Callable[..., Link],
) -> None:
    link = make_link()
    tensors = weights(1.0)
    for value in (2.0, 3.0):
        for tensor in tensors.values():
            tensor.fill_(value)
        link.publish(tensors)
        for tensor in tensors.values():
            tensor.fill_(-1.0)
        assert link.state()["values"] == [value]


def test_an_explicit_session_is_invisible_until_it_ends(make_link: Callable[..., Link]) -> None:
    link = make_link()
    link.publish(weights(1.0))
    named = list(weights(2.0).items())
    with link.publisher.session() as session:
        for item in named:
            session.send([item])
            assert link.state()["values"] == [1.0]
    assert link.state()["values"] == [2.0]
    link.publisher.begin()
    link.publisher.send(weights(3.0))
    link.publisher.abort()
    assert link.state()["values"] == [2.0]
