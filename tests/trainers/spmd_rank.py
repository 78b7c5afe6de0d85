"""One of four ranks of a trainer that publish together.

Arguments: rank, world, store, checkpoint, checkpoint with tied weights, addresses of three engines, checks to run.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent))
import spmd_support as support

import weight_sync
import weight_sync.spmd.mesh_update
from rollout import Engine
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.spmd.publisher import SpmdPublisher
from weight_sync.spmd.share import RankShare


class Trainer:
    """What the checks share."""

    def __init__(self) -> None:
        self.rank, self.world = int(sys.argv[1]), int(sys.argv[2])
        support.join(self.rank, self.world, sys.argv[3])
        self.named = support.checkpoint(sys.argv[4])
        self.tied = support.checkpoint(sys.argv[5])
        self.one, self.two, self.of_tied = sys.argv[6:9]
        self.row = init_device_mesh("cpu", (self.world,), mesh_dim_names=("shards",))
        self.grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def served(self, address: str) -> tuple[int, int]:
        """Version and fingerprint, as rank 0 asks the engine for them."""
        found = None
        if self.rank == 0:
            with WeightPublisher(address) as publisher:
                found = [publisher.engine_info().version, publisher.fingerprint()]
        box = [found]
        dist.broadcast_object_list(box)
        assert box[0] is not None
        return box[0][0], box[0][1]

    def engine(self, address: str) -> str | None:
        """Only rank 0 knows it."""
        return address if self.rank == 0 else None


def every_way_of_cutting(t: Trainer) -> None:
    """Each arrives whole, in one engine and in ranks of one, and compares without a gather."""
    ways = {
        "fsdp": (t.row, lambda named: support.fsdp(named, t.row)),
        "tensor parallel": (t.row, lambda named: support.tensor_parallel(named, t.row)),
        "fsdp over tensor parallel": (
            t.grid,
            lambda n: support.fsdp_over_tensor_parallel(n, t.grid),
        ),
        "nested": (t.grid, lambda named: support.nested(named, t.grid)),
    }
    for step, (way, (mesh, cut)) in enumerate(ways.items()):
        full = support.stepped(t.named, step)
        model: Any = cut(full)
        expected = weight_sync.fingerprint(full)
        assert weight_sync.fingerprint(model) == expected, way
        for address in (t.one, t.two):
            with SpmdPublisher(mesh, bucket_bytes=20_000) as publisher:
                report = publisher.publish(model, t.engine(address), label=way)
            assert report.fingerprint == expected and report.complete, way
            assert t.served(address)[1] == expected, way


def steady_state(t: Trainer) -> None:
    """Later updates open nothing and describe nothing; every byte is written by one rank."""
    with SpmdPublisher(t.row) as publisher:
        for step in range(10, 14):
            model = support.fsdp(support.stepped(t.named, step), t.row)
            report = publisher.publish(model, t.engine(t.one))
            if step == 10:
                share, descriptors = share_of(publisher), len(list(Path("/proc/self/fd").iterdir()))
            assert report.fingerprint == weight_sync.fingerprint(model)
        assert share_of(publisher) is share
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
        sizes = torch.tensor([share.num_bytes])
        dist.all_reduce(sizes)
        assert int(sizes) == report.num_bytes
        part = list(support.stepped(t.named, 14).items())[:3]  # plain tensors: replicated
        report = publisher.publish(part, t.engine(t.one), strict=False)
        assert report.updated == 3 and len(report.left) == len(t.named) - 3
        dist.barrier()


def share_of(publisher: SpmdPublisher) -> RankShare:
    return next(reversed(publisher._plans.values()))[1]


def casts(t: Trainer) -> None:
    """Another dtype is converted as it is written, and reported by every rank."""
    half = {name: tensor.bfloat16() for name, tensor in support.stepped(t.named, 20).items()}
    with SpmdPublisher(t.row) as publisher:
        report = publisher.publish(support.tensor_parallel(half, t.row), t.engine(t.one))
    assert len(report.casts) == len(half)
    assert report.fingerprint == weight_sync.fingerprint(half, dtypes=torch.float32)


def tied_weights(t: Trainer) -> None:
    """Both names may come, cut differently; they must agree."""
    full = support.stepped(t.tied, 30)
    embedding = full["model.embed_tokens.weight"]
    named = support.tensor_parallel(full, t.row)
    twin = ("lm_head.weight", distribute_tensor(embedding, t.row, [Shard(1)]))
    with SpmdPublisher(t.row) as publisher:
        report = publisher.publish([*named, twin], t.engine(t.of_tied))
        assert report.fingerprint == weight_sync.fingerprint(full)
        wrong = embedding.clone()
        wrong[-1, -1] += 1
        twin = ("lm_head.weight", distribute_tensor(wrong, t.row, [Shard(1)]))
        kind, text = support.outcome(lambda: publisher.publish([*named, twin], t.engine(t.of_tied)))
        assert kind == "ManifestMismatch" and "lm_head.weight: differs from" in text, text
        assert publisher.publish(named, t.engine(t.of_tied)).version == report.version + 1


def errors_reach_every_rank(t: Trainer) -> None:
    """What one rank does wrong is the same typed error everywhere, and the version stays."""
    before = t.served(t.one)
    full = support.stepped(t.named, 40)
    good = support.tensor_parallel(full, t.row)
    name = good[0][0]
    partial = DTensor.from_local(t.named[name], t.row, [Partial()])

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from good[:2]
        raise OSError("no such file")

    cases: list[tuple[Any, str, str]] = [
        (
            [*good, ("model.nrm.weight", full["model.norm.weight"])],
            "ManifestMismatch",
            "did you mean",
        ),
        ([(name, torch.ones(3)), *good[1:]], "ManifestMismatch", "on rank"),
        ([*good[1:], (name, partial)], "ManifestMismatch", "got placement Partial"),
        (good[1:], "ManifestMismatch", "elements on the ranks of the mesh"),
        (broken(), "RemoteError", "no such file"),
        ([*good, "nonsense"], "ManifestMismatch", "not a named tensor"),
    ]
    with SpmdPublisher(t.row, timeout_s=20) as publisher:
        for culprit, (bad, kind, text) in enumerate(cases):
            mine = bad if t.rank == culprit % t.world else good
            got, message = support.outcome(
                lambda mine=mine: publisher.publish(mine, t.engine(t.one))
            )
            if t.rank == culprit % t.world and kind == "RemoteError":
                assert got == "OSError"
            else:
                assert got == kind and text in message, (t.rank, culprit, got, message)
        assert t.served(t.one) == before
        refused = support.outcome(lambda: publisher.publish(good, t.engine(t.one), version=1))
        assert refused[0] == "StaleVersionError"
        support.agree(refused)
        assert publisher.publish(good, t.engine(t.one)).fingerprint == weight_sync.fingerprint(full)


def one_engine_per_row(t: Trainer) -> None:
    """On a grid the first rank of every row may bring an engine; one arena serves both."""
    full = support.stepped(t.named, 50)
    mine = {0: t.one, 2: t.two}.get(t.rank)
    with SpmdPublisher(t.grid, engine_axis="tp") as publisher:
        model = support.nested(full, t.grid)
        report = publisher.publish(model, mine)
        upper, lower = t.served(t.one), t.served(t.two)
        assert upper[1] == lower[1] == weight_sync.fingerprint(full)
        assert report.version == (upper if t.rank < 2 else lower)[0]


def the_call_of_existing_trainers(t: Trainer) -> None:
    """`update_weights`, batch by batch; a batch is any part of the model."""
    model = support.fsdp(support.stepped(t.named, 60), t.row)
    named = list(model.named_parameters())
    batches = (named[:5], named[5:], named)
    for batch in (*batches, *batches):
        report = asyncio.run(
            weight_sync.update_weights(
                t.engine(t.two), batch, device_mesh_key="shards", device_mesh=t.row
            )
        )
        assert report.updated == len(batch)
    assert report.fingerprint == weight_sync.fingerprint(model)
    publisher = weight_sync.spmd.mesh_update._PUBLISHERS[t.row, "shards"]
    assert len(publisher._plans) == len(batches)
    weight_sync.close_mesh(t.row)


def engines_elsewhere(t: Trainer) -> None:
    """The ranks write together, and rank 0 broadcasts the arena to the engine's ranks."""
    group: Any = {"transport": "process_group", "group_backend": "gloo"}
    with SpmdPublisher(t.row, **group, bucket_bytes=20_000) as publisher:
        for step in (80, 81):
            model = support.fsdp(support.stepped(t.named, step), t.row)
            report = publisher.publish(model, t.engine(t.two))
            assert report.transport == "process_group"
            assert report.fingerprint == weight_sync.fingerprint(model) == t.served(t.two)[1]


def a_late_rank_costs_one_update(t: Trainer) -> None:
    """The deadline passes for the others, the late rank hears of it, and the next update is whole."""
    model = support.fsdp(support.stepped(t.named, 90), t.row)
    with SpmdPublisher(t.row, timeout_s=6.0) as publisher:
        if t.rank == 2:
            time.sleep(8.0)
        kind, text = support.outcome(lambda: publisher.publish(model, t.engine(t.one)))
        assert kind == "DeadlineExceeded" and "ranks [2]" in text, (kind, text)
        dist.barrier()
        report = publisher.publish(model, t.engine(t.one))
        assert report.fingerprint == weight_sync.fingerprint(model)


class Foreign:
    """An engine that is not ours: it has the call, awaitable, and keeps what it got."""

    def __init__(self, fails: bool = False) -> None:
        self.got: dict[str, torch.Tensor] = {}
        self.fails = fails

    async def update_weights_from_tensor(self, pairs: Any) -> tuple[bool, str]:
        await asyncio.sleep(0)
        if self.fails:
            raise ValueError("it has no such layer")
        self.got.update({name: tensor.clone() for name, tensor in pairs})
        return True, "thank you"


def an_engine_that_takes_whole_tensors(t: Trainer) -> None:
    """They are put together in rank 0's arena, without a gather, and handed to the engine's own call."""
    full = support.stepped(t.named, 70)
    named = list(support.fsdp(full, t.row).named_parameters())
    foreign = Foreign()

    def update(engine: Any, batch: Any) -> Any:
        mine = engine if t.rank == 0 else None
        return asyncio.run(weight_sync.update_weights(mine, batch, "shards", t.row))

    for _ in range(2):
        for batch in (named[:7], named[7:]):
            success, message = update(foreign, batch)
            assert success and "thank you" in message
    if t.rank == 0:
        assert set(foreign.got) == set(full)
        assert all(torch.equal(foreign.got[name], tensor) for name, tensor in full.items())
    _, text = support.outcome(lambda: update(Foreign(fails=True), named))
    assert "no such layer" in text, text
    if (
        t.rank == 0
    ):  # an explicit session of an engine takes the batches in, and commits them as one
        with Engine(sys.argv[4], kv_cache_bytes=1 << 20, skip_tokenizer_init=True) as engine:
            before = engine.weights_fingerprint()
            engine.begin_weight_update(strict=True)
            update(engine, named[:7])
            update(engine, named[7:])
            assert engine.weights_fingerprint() == before
            assert engine.end_weight_update().fingerprint == weight_sync.fingerprint(full)
    else:
        update(None, named[:7])
        update(None, named[7:])
    weight_sync.close_mesh(t.row)


def fingerprints(t: Trainer) -> None:
    """Replicated tensors count once; plain and distributed ones mix."""
    full = t.named["model.embed_tokens.weight"]
    shards = {
        "a": distribute_tensor(full, t.grid, [Replicate(), Shard(0)]),
        "b": distribute_tensor(full, t.grid, [Replicate(), Replicate()]),
        "c": distribute_tensor(full, t.row, [Shard(1)]),
        "d": full,
    }
    whole = dict.fromkeys(shards, full)
    assert weight_sync.fingerprint(shards) == weight_sync.fingerprint(whole)
    expected = weight_sync.fingerprint(whole, dtypes=torch.bfloat16)
    assert weight_sync.fingerprint(shards, dtypes=torch.bfloat16) == expected


def a_publisher_that_nobody_closed(t: Trainer) -> None:
    """Each rank that drops it gives back its part, whatever the others do."""
    model = support.fsdp(support.stepped(t.named, 95), t.row)

    def left() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("memfd:weight-arena")
        return threading.active_count() + len(list(Path("/proc/self/fd").iterdir())), maps

    before = left()
    publisher = SpmdPublisher(t.row)
    publisher.publish(model, t.engine(t.one))
    dist.barrier()
    assert left()[0] > before[0] and left()[1] > before[1]
    del publisher
    end = time.monotonic() + 30
    while left() > before and time.monotonic() < end:
        time.sleep(0.01)
    now = left()
    assert now[0] <= before[0] and now[1] <= before[1], (t.rank, before, now)


CHECKS = (
    fingerprints,
    every_way_of_cutting,
    steady_state,
    casts,
    tied_weights,
    errors_reach_every_rank,
    one_engine_per_row,
    engines_elsewhere,
    a_late_rank_costs_one_update,
    a_publisher_that_nobody_closed,
    the_call_of_existing_trainers,
    an_engine_that_takes_whole_tensors,
)


def main() -> None:
    trainer = Trainer()
    chosen = sys.argv[9:]
    for check in CHECKS:
        if not chosen or check.__name__ in chosen:
            check(trainer)
            dist.barrier()
            if trainer.rank == 0:
                print("passed", check.__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
