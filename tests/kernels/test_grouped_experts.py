"""Experts over sorted tokens: the kernels, under triton's interpreter and on a GPU, beside float64."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from interpreted import Checks, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from rollout_kernels import expert_configs
from rollout_kernels.expert_configs import EXACT, ExpertConfig, TileConfig, expert_config
from rollout_kernels.expert_routing import Routing, choose_experts
from rollout_kernels.grouped_experts import grouped_experts, reference

CHECKS = Checks()
SHAPES = {
    "exact": EXACT,
    "uneven": ExpertConfig(
        rows=64,
        gate_up=TileConfig(columns=128, depth=64, warps=8, stages=3),
        down=TileConfig(columns=32, depth=128, warps=4, stages=2),
    ),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@CHECKS.add(
    {"dtype": torch.float32, "tokens": 1, "top_k": 2, "sizes": (64, 48)},
    {"dtype": torch.float32, "tokens": 21, "top_k": 3, "sizes": (72, 40)},
    {"dtype": torch.bfloat16, "tokens": 9, "top_k": 2, "sizes": (64, 64)},
    {"dtype": torch.bfloat16, "tokens": 0, "top_k": 2, "sizes": (64, 64)},
    {"dtype": torch.bfloat16, "tokens": 40, "top_k": 4, "sizes": (64, 144), "tiles": "uneven"},
    {"dtype": torch.bfloat16, "tokens": 40, "top_k": 4, "sizes": (64, 64), "tiles": "exact"},
    {"dtype": torch.float32, "tokens": 7, "top_k": 3, "sizes": (64, 16), "ranks": 2},
)
def experts_are_what_float64_says(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    sizes: tuple[int, int],
    tiles: str | None = None,
    ranks: int = 1,
) -> None:
    hidden, width = sizes
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    gate_up = (torch.randn(6, 2 * width, hidden, generator=generator) / 8).to(device, dtype)
    down = (torch.randn(6, hidden, width, generator=generator) / 8).to(device, dtype)
    weights = torch.rand(tokens, top_k, generator=generator).to(device)
    ids = torch.rand(tokens, 6, generator=generator).topk(top_k, -1).indices.to(device)
    ids[:, 0] = torch.where(ids[:, 0] == 4, 5, ids[:, 0])  # a busy expert, and one that idles
    total = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
    for rank in range(ranks):
        mine = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
        got = grouped_experts(
            *(x, weights, ids, gate_up[mine], down[mine]),
            first_expert=mine.start,
            config=SHAPES.get(tiles),
        )
        assert got.dtype == dtype and not got.isnan().any()
        total += got.double()
    wide = [tensor.double() for tensor in (x, weights)]
    want = reference(*wide, ids, gate_up.double(), down.double())
    assert tokens == 0 or relative_error(total, want) < TOLERANCE[dtype]


@CHECKS.add()
def a_token_is_the_same_alone_and_in_a_batch(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 64, generator=generator).to(device)
    gate_up = torch.randn(4, 64, 64, generator=generator).to(device)
    down = torch.randn(4, 64, 32, generator=generator).to(device)
    weights = torch.rand(12, 2, generator=generator).to(device)
    ids = torch.rand(12, 4, generator=generator).topk(2, -1).indices.to(device)
    together = grouped_experts(x, weights, ids, gate_up, down)
    alone = grouped_experts(x[5:6], weights[5:6], ids[5:6], gate_up, down)
    torch.testing.assert_close(alone, together[5:6], rtol=1e-6, atol=1e-6)


@CHECKS.add()
def rows_of_one_shape_have_the_same_bits_in_any_batch(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 80, generator=generator).to(device)
    gate_up = torch.randn(2, 2 * 72, 80, generator=generator).to(device)
    down = torch.randn(2, 80, 72, generator=generator).to(device)
    weights = torch.rand(150, 2, generator=generator).to(device)
    ids = torch.rand(150, 2, generator=generator).argsort(-1).to(device)
    together = grouped_experts(x, weights, ids, gate_up, down, config=EXACT)
    for part in (slice(70, 71), slice(3, 90)):
        alone = grouped_experts(x[part], weights[part], ids[part], gate_up, down, config=EXACT)
        assert torch.equal(alone, together[part])


@CHECKS.add()
def the_host_reads_nothing(device: torch.device) -> None:
    reads: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2"):
                reads.append(name)
            return func(*args, **(kwargs or {}))

    routing = Routing(
        top_k=2,
        sigmoid=False,
        normalise=True,
        scale=1.0,
        num_groups=1,
        top_groups=1,
        rounded=True,
    )
    x, both = torch.randn(9, 32, device=device), torch.randn(4, 32, 32, device=device)
    with Noting():
        weights, ids = choose_experts(torch.randn(9, 4, device=device), None, routing)
        out = grouped_experts(x, weights, ids, both, torch.randn(4, 32, 16, device=device))
    assert not reads and not out.isnan().any()


@pytest.mark.parametrize("device", json.loads(expert_configs.FILE.read_text()))
def test_every_call_has_a_shape(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_configs, "device_name", lambda _: device)
    facts = {"num_experts": 128, "dtype": torch.bfloat16}
    cpu = torch.device("cpu")
    rows = [expert_config(cpu, num_rows=8 * n, **facts).rows for n in (1, 64, 8192, 10**6)]
    assert rows == sorted(rows) and rows[0] >= 16


verdicts, test_under_the_interpreter, test_on_the_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
