"""Group-normalised advantages."""

import pytest
import torch

from trainers_integration.grpo.advantages import group_advantages


def test_a_group_is_centred_and_scaled_by_its_own_spread():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [4.0, 2.0, 2.0, 0.0]]))
    assert torch.allclose(advantages[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert torch.allclose(advantages[1], torch.tensor([2.0, 0.0, 0.0, -2.0]) / 2**0.5)


def test_without_scaling_a_group_is_only_centred():
    advantages = group_advantages(torch.tensor([[4.0, 2.0, 0.0]]), normalize_std=False)
    assert advantages.tolist() == [[2.0, 0.0, -2.0]]


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_teaches_nothing(reward):
    # The mean of equal floats may differ from them in the last bit; dividing that by the spread would be noise.
    assert group_advantages(torch.full((2, 7), reward)).abs().max() == 0


def test_one_sample_is_no_group():
    with pytest.raises(ValueError, match="samples_per_prompt"):
        group_advantages(torch.zeros(4, 1))
