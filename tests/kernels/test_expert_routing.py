"""The choice of experts and the order of their rows: the kernels, under triton's interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from interpreted import Checks

from rollout.layers.router import Router
from rollout_kernels.expert_routing import Routing, choose_experts, sort_rows

CHECKS = Checks()
PLAIN: dict[str, Any] = {
    "top_k": 3,
    "sigmoid": False,
    "normalise": False,
    "scale": 1.0,
    "num_groups": 1,
    "top_groups": 1,
    "rounded": True,
}
GLM = {**PLAIN, "sigmoid": True, "normalise": True, "scale": 1.5, "rounded": False}
FAMILIES = {
    "plain": PLAIN,
    "normalised": {**PLAIN, "normalise": True, "top_k": 8},
    "sigmoid": GLM,
    "sigmoid in groups": {**GLM, "num_groups": 4, "top_groups": 2},
    "softmax in groups": {**PLAIN, "num_groups": 3, "top_groups": 2},
}


@CHECKS.add(
    {"family": "plain", "dtype": torch.bfloat16},
    *({"family": family, "dtype": torch.float32} for family in FAMILIES),
)
def experts_are_those_of_the_router(device: torch.device, family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    biased = "sigmoid" in family
    routing = Routing(**FAMILIES[family])
    router = Router(16, 12, routing, correction_bias=biased, float32=False)
    router.weight.data.normal_(0, 1)
    router = router.to(device, dtype)
    if router.bias is not None:
        router.bias.data = torch.randn(12, device=device)
    x = torch.randn(23, 16).to(device, dtype)
    logits = router.logits(x)
    weights, ids = choose_experts(logits, router.bias, router.routing)
    want_weights, want_ids = router(x)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    if dtype == torch.float32:
        assert ids.tolist() == want_ids.tolist()
    else:  # logits are equal here and there
        assert torch.equal(logits.gather(1, ids), logits.gather(1, want_ids))
        assert all(len(set(row)) == len(row) for row in ids.tolist())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(weights, want_weights, rtol=tolerance, atol=0)


@CHECKS.add()
def padding_goes_nowhere_and_ids_are_kept_at_slots(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]] * 3, device=device)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    kept = torch.full((6, 2, 2), -1, dtype=torch.int16, device=device)
    routing = Routing(**{**PLAIN, "top_k": 2})
    _, ids = choose_experts(logits, None, routing, slots=slots, routes=kept[:, 1])
    assert ids.tolist() == [[1, 3], [4, 4], [1, 3]]
    assert not (kept[:, 0] + 1).any()
    assert kept[:, 1].tolist() == [[1, 3], *[[-1, -1]] * 3, [1, 3], [-1, -1]]


@CHECKS.add()
def what_is_no_number_goes_to_experts_that_exist(device: torch.device) -> None:
    logits = torch.full((2, 5), float("nan"), device=device)
    _, ids = choose_experts(logits, None, Routing(**PLAIN))
    assert 0 <= int(ids.min()) and int(ids.max()) < 5


@CHECKS.add(
    {"rows": 2, "num": 4},
    {"rows": 16, "num": 700},
    {"rows": 64, "num": 4500},
    {"rows": 1, "num": 1},
)
def rows_are_sorted_into_tiles_of_one_expert_each(
    device: torch.device, rows: int, num: int
) -> None:
    ids = torch.randint(8, (num, 3), generator=torch.Generator().manual_seed(num)).to(device)
    tiles = sort_rows(ids, first_expert=1, num_experts=5, rows=rows)
    found = []
    for expert, first, end in zip(tiles.experts, tiles.first, tiles.end, strict=True):
        if expert < 5:
            assert first < end
            places = range(int(first), min(int(first) + rows, int(end)))
            found += [(int(expert) + 1, int(tiles.order[place])) for place in places]
    flat = ids.flatten().tolist()
    assert found == sorted((e, row) for row, e in enumerate(flat) if 1 <= e <= 5)


verdicts, test_under_the_interpreter, test_on_the_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
