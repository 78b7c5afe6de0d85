"""Log-probabilities of given and of most likely tokens are those of the rule, for drawn tokens and for prompts."""

from __future__ import annotations

import torch
from interpreted import Checks, poisoned

from rollout_kernels import token_logprobs
from rollout_kernels.logit_stats import LogitStats, compute_stats
from rollout_kernels.sampling import SampledTokens, SamplingRows, SamplingScratch, sample

CHECKS = Checks()
DTYPES = (torch.float32, torch.bfloat16)


def noise(num_rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return (torch.randn(num_rows, vocab, generator=generator) * 3).to(dtype).to(device)


def exact(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """(R, V) in float64 on the CPU."""
    return torch.log_softmax(logits.cpu().double() / temperature.cpu().double()[:, None], -1)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu().double(), want, atol=4e-6, rtol=1e-6)


@CHECKS.add(*({"dtype": dtype} for dtype in DTYPES))
def given_tokens(device: torch.device, dtype: torch.dtype) -> None:
    logits = noise(4, 2100, dtype, device)
    logits[1, 5] = 60.0
    logits[2, 100:] = float("-inf")
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.3], device=device)
    ids = torch.tensor([[0, 5, 2099], [5, 6, 7], [99, 0, 1], [1024, 1023, -1]], device=device)
    stats = LogitStats.allocate(5, 2100, device)
    compute_stats(logits, temperature, stats)
    out = poisoned((4, 3), torch.float32, device)
    token_logprobs.gather_logprobs(logits, temperature, ids, stats, out)
    want = exact(logits, temperature).gather(1, ids.cpu().clamp(min=0))
    close(out.flatten()[:-1], want.flatten()[:-1])
    assert out[3, 2].isnan()
    reference = token_logprobs.reference(logits, temperature, ids.clamp(min=0))
    torch.testing.assert_close(out[:3], reference[:3], atol=4e-6, rtol=1e-6)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    some, warm = poisoned((2,), torch.float32, device), temperature[rows.long()]
    compute_stats(logits, warm, stats, logit_rows=rows)
    column = ids[rows.long(), 0].int()
    token_logprobs.gather_logprobs(logits, warm, column, stats, some, logit_rows=rows)
    assert torch.equal(some, out[rows.long(), 0])


@CHECKS.add(*({"dtype": dtype} for dtype in DTYPES))
def most_likely_tokens(device: torch.device, dtype: torch.dtype) -> None:
    logits = noise(4, 2100, dtype, device)
    logits[2] = 0.0
    logits[3, [7, 1500, 2099, 1501]] = 30.0
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.3], device=device)
    stats = LogitStats.allocate(4, 2100, device)
    compute_stats(logits, temperature, stats)
    ids = poisoned((4, 9), torch.int64, device)
    values = poisoned((4, 9), torch.float32, device)
    wanted = torch.tensor([9, 0, 5, 20], dtype=torch.int32, device=device)
    token_logprobs.top_logprobs(logits, temperature, wanted, stats, ids, values)
    order = torch.sort(logits.cpu().float(), dim=-1, descending=True, stable=True).indices
    logprobs = exact(logits, temperature)
    for row, number in enumerate((9, 0, 5, 9)):
        assert ids[row, :number].tolist() == order[row, :number].tolist()
        close(values[row, :number], logprobs[row][order[row, :number]])
        assert (ids[row, number:] < 0).all() and values[row, number:].isnan().all()


@CHECKS.add()
def tokens_beside_a_draw(device: torch.device) -> None:
    logits = noise(3, 1500, torch.bfloat16, device)
    rows = SamplingRows(
        seeds=torch.arange(3, device=device),
        positions=torch.arange(3, device=device),
        temperature=torch.tensor([0.7, 1.0, 1.9], device=device),
        greedy=torch.zeros(3, dtype=torch.bool, device=device),
    )
    scratch = SamplingScratch.allocate(3, 1500, device)
    drawn = SampledTokens.allocate(3, device)
    sample(logits, rows, scratch, drawn)
    again = poisoned((3,), torch.float32, device)
    token_logprobs.gather_logprobs(logits, rows.temperature, drawn.token_ids, scratch.stats, again)
    assert torch.equal(again, drawn.logprobs)


@CHECKS.add(*({"dtype": dtype} for dtype in DTYPES))
def prompts(device: torch.device, dtype: torch.dtype) -> None:
    hidden, head = noise(7, 32, dtype, device) / 3, noise(1100, 32, dtype, device) / 3
    logits = hidden @ head.T
    targets = torch.tensor([0, 1099, 5, 5, 800, 3, 9], device=device)
    want = exact(logits, torch.ones(7)).gather(1, targets.cpu()[:, None])[:, 0]
    for num_rows in (3, 16):
        buffer = poisoned((num_rows, 1100), dtype, device)
        out = token_logprobs.prompt_logprobs(
            hidden,
            lambda piece, rows: torch.mm(piece, head.T, out=rows),
            targets,
            buffer,
            LogitStats.allocate(num_rows, 1100, device),
            poisoned((7,), torch.float32, device),
        )
        # A product of fewer rows may sum in another order.
        tolerance = 4e-6 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(out.cpu().double(), want, atol=tolerance, rtol=1e-6)


verdicts, test_under_the_interpreter, test_on_the_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
