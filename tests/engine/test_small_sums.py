"""Which sums go through memory that all ranks see, and what happens where there is none; when graphs are lost."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from rollout.distributed.group_coordinator import GroupCoordinator
from rollout.distributed.small_sums import Limits, SmallSums
from rollout.engine.loop.memory_commands import MemoryCommands
from rollout.layers.linear import RowParallelLinear
from rollout.protocol import commands as cmd
from weight_sync.wire.local_call import LocalCall


class Others:
    """A group in which the other rank says the same as this one."""

    rank, size, name = 0, 2, "toy"

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([tensor, tensor], dim)


def sums(**limits: int) -> SmallSums:
    return SmallSums(torch.zeros(1024, dtype=torch.uint8), "toy", Limits(**limits))


def test_room_is_for_small_tensors_of_dtypes_that_can_be_added() -> None:
    small = sums(one_shot=256, two_shot=1024)
    ops = torch.ops.symm_mem
    for num_bytes, way in [
        (16, ops.one_shot_all_reduce_out),
        (256, ops.one_shot_all_reduce_out),
        (272, ops.two_shot_all_reduce_out),
        (1024, ops.two_shot_all_reduce_out),
    ]:
        room = small.room((num_bytes // 4, 2), torch.bfloat16)
        assert room is not None and room.shape == (num_bytes // 4, 2)
        assert small._way(num_bytes, torch.float32) is way
    assert small.room((5, 2), torch.bfloat16) is None, "kernels add 16 bytes at a time"
    assert small.room((260,), torch.float32) is None
    assert small.room((64,), torch.float16) is None
    assert small.all_reduce(torch.ones(260)) is None


def test_without_such_memory_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert SmallSums.open(Others(), None, torch.device("cpu")) is None  # type: ignore[arg-type]
    [record] = caplog.records
    assert "'toy' go through NCCL: rank 0 has no GPU" in record.message


def test_a_product_is_written_where_its_sum_is_taken() -> None:
    buffer = torch.zeros(3, 4)
    seen = []

    class Tp:
        rank, size = 0, 2

        def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
            return buffer if shape == (3, 4) and dtype == torch.float32 else None

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            seen.append(tensor.data_ptr())
            return tensor.clone()

    layer = RowParallelLinear("o", 8, 4, bias=False, tp=Tp())  # type: ignore[arg-type]
    layer.weight.data.normal_()
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight.t())
    layer(torch.randn(2, 4))
    assert seen[0] == buffer.data_ptr() != seen[1]


def test_a_muted_group_asks_nobody() -> None:
    group = GroupCoordinator(
        rank=1,
        size=2,
        name="toy",
        device=torch.device("cpu"),
        cpu_group=None,
        device_group=None,
    )
    with group.muted():
        assert group.all_reduce(torch.ones(3)).shape == (3,)
        assert group.all_gather(torch.ones(2, 3), dim=0).shape == (4, 3)
    with pytest.raises(Exception, match="destroyed"):
        group.all_reduce(torch.ones(3))


@pytest.mark.parametrize("other_moved", [0, 1])
def test_graphs_are_lost_on_all_ranks_or_on_none(other_moved: int) -> None:
    """This rank's memory is where it was; the other rank's may not be."""
    answers, events = [0, other_moved, 7], []

    class Graphs:
        moved, captured = False, True

        def forget(self) -> None:
            events.append("forget")
            self.captured = False

        def capture(self) -> None:
            raise AssertionError("one rank may fail here alone; steps fail together")

    runner = SimpleNamespace(graphs=Graphs())
    order = SimpleNamespace(size=2, all_reduce=lambda tensor: tensor + answers.pop(0))
    memory = SimpleNamespace(resume=lambda tags: (["kv_cache"], 7), released=set())
    commands = MemoryCommands(memory, runner, None, None, order, lambda: None)  # type: ignore[arg-type]
    call = LocalCall(cmd.ResumeMemory(tags=["kv_cache"]), 1e9)
    commands.handlers()[cmd.ResumeMemory](call)
    assert events == ["forget"] * other_moved and not answers
