"""Who starts first in a decode launch changes nothing: under triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from attention_batch import Batch, Case
from interpreted import Checks

from rollout_kernels import paged_decode as kernels

CHECKS = Checks()


@CHECKS.add({"shared": False}, {"shared": True})
def every_bit_is_the_same_in_any_order(device: torch.device, shared: bool) -> None:
    batch = Batch(Case(lengths=(20, 0, 100, 66, 40, 75), block_size=16), str(device), seed=3)
    batch.share({(2, 3, 5): 4})
    decode = batch.shared_decode if shared else batch.decode
    order = torch.tensor([2, 5, 3, 4, 0, 1], dtype=torch.int32, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ORDERED_PROGRAMS", 1)
        for mixed in (order, order.flip(0)):
            assert torch.equal(decode(), decode(order=mixed))
        assert decode(order=torch.zeros_like(order))[1:].isnan().all(), "nobody looked at it"


verdicts, test_under_the_interpreter, test_on_the_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
