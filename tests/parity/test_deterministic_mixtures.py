"""One set of bits for a token of a mixture of experts in any batch, in triton's interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deterministic_support import check_any_batch_chunk_or_prefix, make_model
from interpreted import Checks

CHECKS = Checks()
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False,
        "num_hidden_layers": 1,
    },
    "glm4_moe": {
        "head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    },
}


@CHECKS.add(*({"family": family} for family in MIXTURES))
def any_batch_chunk_or_prefix(device: torch.device, family: str) -> None:
    model = make_model(family, torch.float32, **MIXTURES[family])
    check_any_batch_chunk_or_prefix(model, device)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return CHECKS.verdicts(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == "ok", interpreted[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name: str) -> None:
    CHECKS[name](torch.device("cuda"))


if __name__ == "__main__":
    CHECKS.main()
