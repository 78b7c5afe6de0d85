"""One set of bits for a token of a mixture of experts in any batch, in triton's interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

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


verdicts, test_interpreted, test_on_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
