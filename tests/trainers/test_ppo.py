"""PPO: advantages by hand, a critic that learns, a loop that drives an engine, and the demo's option."""

import json

import pytest
import torch
from test_demo_run import run

from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.model import build_model
from trainers_integration.grpo.batch import make_batch
from trainers_integration.grpo.config import GrpoConfig, PpoConfig
from trainers_integration.grpo.losses import policy_loss
from trainers_integration.grpo.rollouts import Completion, VersionSpan
from trainers_integration.ppo import (
    Critic,
    PpoLearner,
    gae,
    token_rewards,
    value_loss,
    whitened,
)

T, F = True, False
MASK = torch.tensor([[F, T, T, T, F], [F, F, T, T, T]])


def completion(prompt, output, version=0):
    return Completion(
        prompt_ids=tuple(prompt),
        output_ids=tuple(output),
        logprobs=(-1.0,) * len(output),
        spans=(VersionSpan(version=version, start=0, end=len(output)),),
        finish_reason="stop",
        latency_s=0.0,
        token_times=(),
    )


def test_the_outcome_comes_with_the_last_token_and_a_penalty_with_every_one():
    outcomes = torch.tensor([1.0, -2.0])
    assert token_rewards(outcomes, MASK).tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, -2]]
    penalties = torch.full((2, 5), 0.25)
    assert token_rewards(outcomes, MASK, penalties).tolist() == [
        [0, -0.25, -0.25, 0.75, 0],
        [0, 0, -0.25, -0.25, -2.25],
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0)])
def test_advantages_are_the_discounted_sum_of_surprises(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 5, generator=generator).masked_fill(~MASK, 0.0)
    values = torch.randn(2, 5, generator=generator)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, positions in enumerate(([1, 2, 3], [2, 3, 4])):
        v = [values[row, t].item() for t in positions] + [0.0]
        delta = [rewards[row, t].item() + gamma * v[k + 1] - v[k] for k, t in enumerate(positions)]
        for k, t in enumerate(positions):
            want = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, 3))
            assert advantages[row, t].item() == pytest.approx(want, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(want + v[k], abs=1e-5)
    assert advantages[~MASK].tolist() == returns[~MASK].tolist() == [0.0] * 4


def test_whitening_looks_at_sampled_tokens_alone():
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)) * 3 + 2
    got = whitened(values, MASK)
    assert got[MASK].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert got[MASK].std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert got[~MASK].tolist() == [0.0] * 4


def test_a_value_that_has_moved_far_gets_no_more_for_it():
    before = torch.zeros(1, 2)
    returns = torch.tensor([[1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    values = torch.tensor([[0.1, 0.5]], requires_grad=True)
    value_loss(values, before, returns, mask, clip=0.2).backward()
    near, far = values.grad[0].tolist()
    assert near == pytest.approx((0.1 - 1.0) / 2)
    assert far == 0.0  # clipped at 0.2, which is worse than 0.5


def test_one_advantage_for_all_tokens_is_the_same_advantage_at_each():
    generator = torch.Generator().manual_seed(2)
    current, proximal, behaviour = (torch.randn(2, 5, generator=generator) for _ in range(3))
    each = torch.tensor([1.5, -0.5])
    given = {"current": current, "proximal": proximal, "behaviour": behaviour, "mask": MASK}
    one = policy_loss(**given, advantages=each)
    many = policy_loss(**given, advantages=each.unsqueeze(1).expand(2, 5))
    assert one.loss.item() == many.loss.item()


def learner(**changes):
    config = GrpoConfig(
        steps=40, minibatches=2, lr_warmup_steps=0, lr_final_fraction=1.0, **changes
    )
    model = build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0)
    return PpoLearner(model, config, PpoConfig(critic_learning_rate=3e-3), seed=0)


def test_the_critic_learns_what_to_expect_of_a_prompt_and_the_policy_does_what_pays():
    generator = torch.Generator().manual_seed(0)
    ppo = learner(learning_rate=1e-3)
    assert isinstance(ppo.critic, Critic)
    assert ppo.critic(torch.tensor([[3, 4]])).tolist() == [[0.0, 0.0]]
    good, stats = 0.0, []
    for _ in range(40):
        rows, outcomes = [], []
        with torch.no_grad():
            logits = ppo.model(input_ids=torch.tensor([[3, 2], [4, 2]])).logits[:, -1]
        tables = torch.log_softmax(logits, -1)
        for first in (3, 4) * 16:  # after 3, token 5 pays; after 4 nothing does
            table = tables[first - 3]
            drawn = int(torch.multinomial(table.exp(), 1, generator=generator))
            row = completion([first, 2], [drawn])
            object.__setattr__(row, "logprobs", (table[drawn].item(),))
            rows.append(row)
            outcomes.append(float(first == 3 and drawn == 5))
        good = sum(outcomes) / 16
        stats.append(ppo.learn(make_batch(rows, torch.tensor(outcomes))))
    assert good > 0.8
    values = ppo.critic(torch.tensor([[3, 2], [4, 2]]))[:, -1].tolist()
    assert values[0] > 0.6 > 0.3 > values[1]
    assert stats[-1].explained_variance > 0.5 > stats[0].explained_variance
    assert all(stat.logprob_gap_max < 1e-4 for stat in stats)
    assert stats[-1].value_loss < max(stat.value_loss for stat in stats)


def test_a_reference_policy_is_paid_for_in_rewards():
    ppo = learner(kl_coef=0.5)
    rows = [completion([3, 2], [5, 6]), completion([4, 2], [7])]
    assert ppo.learn(make_batch(rows, torch.tensor([1.0, 0.0]))).kl == 0.0  # the same policy yet
    assert ppo.learn(make_batch(rows, torch.tensor([1.0, 0.0]))).kl != 0.0


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"gamma: got 1\.5, expected between 0 and 1; value_clip"):
        PpoConfig(gamma=1.5, value_clip=0.0)


@pytest.mark.parametrize("mode", ["sync", "continuous"])
def test_the_demo_runs_with_ppo(small_demo, mode):
    config = small_demo("algorithm=ppo", f"mode={mode}", "in_flight_steps=2")
    summary, screen = run(config)
    assert summary["algorithm"] == "ppo"
    assert f"PPO, {mode}" in screen
    assert summary["logprob_gap_own_max"] is None or summary["logprob_gap_own_max"] < 1e-4
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["phase"] == "train" and row["step"]]
    assert all("explained_variance" in row and row["value_loss"] >= 0 for row in trained)
    assert "with PPO" in (config.folder / "report.html").read_text()
