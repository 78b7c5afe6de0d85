"""The GRPO objective, against the formula written out token by token."""

import math

import pytest
import torch

from trainers_integration.grpo.losses import (
    kl_to_reference,
    masked_mean,
    policy_loss,
    token_logprobs,
)


def random_inputs(seed=0, shape=(5, 7)):
    generator = torch.Generator().manual_seed(seed)

    def draw(spread):
        return -2 + spread * torch.randn(shape, generator=generator)

    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, 0] = True
    return {
        "current": draw(0.5),
        "proximal": draw(0.5),
        "behaviour": draw(0.5),
        "reference": draw(0.5),
        "advantages": torch.randn(shape[0], generator=generator),
        "mask": mask,
    }


def written_out(inputs, *, clip_low, clip_high, cap, kl_coef):
    total, count = 0.0, 0
    for b, row in enumerate(inputs["mask"].tolist()):
        for t, sampled in enumerate(row):
            if not sampled:
                continue
            current, proximal, behaviour, reference = (
                inputs[name][b, t].item()
                for name in ("current", "proximal", "behaviour", "reference")
            )
            advantage = inputs["advantages"][b].item()
            weight = min(math.exp(proximal - behaviour), cap)
            ratio = math.exp(current - proximal)
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
            kl = math.exp(reference - current) - (reference - current) - 1
            total += -weight * min(ratio * advantage, clipped * advantage) + kl_coef * kl
            count += 1
    return total / count


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_formula(seed, kl_coef):
    inputs = random_inputs(seed)
    parts = policy_loss(**inputs, clip_low=0.1, clip_high=0.3, importance_cap=1.5, kl_coef=kl_coef)
    expected = written_out(inputs, clip_low=0.1, clip_high=0.3, cap=1.5, kl_coef=kl_coef)
    assert parts.loss.item() == pytest.approx(expected, rel=1e-5)


def test_what_stands_outside_the_mask_does_not_matter():
    inputs = random_inputs()
    poisoned = {
        name: value.masked_fill(~inputs["mask"], 1e4)
        if value.shape == inputs["mask"].shape
        else value
        for name, value in inputs.items()
        if name != "mask"
    }
    clean = policy_loss(**inputs, kl_coef=0.1)
    assert policy_loss(**poisoned, mask=inputs["mask"], kl_coef=0.1) == clean


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [
        (1.5, 1.0, False),  # already much more likely, and good: no more of it
        (1.5, -1.0, True),
        (0.5, -1.0, False),  # already much less likely, and bad: no more of it
        (0.5, 1.0, True),
        (1.0, 1.0, True),
    ],
)
def test_clipping_stops_the_gradient_only_where_the_policy_went_far_enough(
    ratio, advantage, has_gradient
):
    proximal = torch.full((1, 1), -1.0)
    current = (proximal + math.log(ratio)).requires_grad_()
    parts = policy_loss(
        current=current,
        proximal=proximal,
        behaviour=proximal,
        advantages=torch.tensor([advantage]),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    parts.loss.backward()
    assert bool(current.grad.abs().sum() > 0) is has_gradient
    assert parts.clip_fraction == (0.0 if has_gradient else 1.0)


def test_a_token_that_the_engine_found_unlikely_counts_more_up_to_the_cap():
    proximal = torch.tensor([[math.log(0.5), math.log(0.5)]])
    behaviour = torch.tensor([[math.log(0.4), math.log(0.01)]])
    current = proximal.clone().requires_grad_()
    parts = policy_loss(
        current=current,
        proximal=proximal,
        behaviour=behaviour,
        advantages=torch.tensor([1.0]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        importance_cap=2.0,
    )
    parts.loss.backward()
    assert torch.allclose(current.grad, torch.tensor([[-1.25, -2.0]]) / 2)
    assert parts.truncated_fraction == 0.5
    assert parts.importance_mean == pytest.approx((1.25 + 2.0) / 2)


def test_the_kl_estimate_is_never_negative_and_zero_for_equal_policies():
    current = -3 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    reference = current.roll(1)
    assert kl_to_reference(current, reference).min() >= 0
    assert kl_to_reference(current, current).abs().max() == 0


def test_the_kl_estimate_is_right_on_average():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    estimate = (policy * kl_to_reference(policy.log(), reference.log())).sum()
    assert estimate.item() == pytest.approx((policy * (policy / reference).log()).sum().item())


def test_every_token_counts_the_same_however_long_its_sequence():
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True] + [False] * 3])
    assert masked_mean(values, mask).item() == pytest.approx(9 / 5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probabilities_are_those_of_the_tempered_distribution(temperature):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    logprobs, entropy = token_logprobs(logits, targets, temperature)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    assert torch.allclose(logprobs, distribution.log_prob(targets), atol=1e-6)
    assert torch.allclose(entropy, distribution.entropy(), atol=1e-6)
