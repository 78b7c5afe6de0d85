"""From completions to padded batches, and from batches to new weights."""

import pytest
import torch

from rollout.errors import RolloutError
from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.model import build_model
from trainers_integration.grpo.batch import make_batch
from trainers_integration.grpo.config import GrpoConfig
from trainers_integration.grpo.learner import Learner
from trainers_integration.grpo.losses import token_logprobs
from trainers_integration.grpo.rollouts import Completion, parse_completion


def completion(prompt, output, logprobs=None):
    return Completion(
        prompt_ids=tuple(prompt),
        output_ids=tuple(output),
        logprobs=tuple(logprobs or [-1.0] * len(output)),
        spans=(),
        finish_reason="stop",
        latency_s=0.1,
        token_times=(),
    )


@pytest.fixture
def model():
    return build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0)


def ragged():
    return [completion([3, 4, 2], [5]), completion([6, 2], [7, 8, 9, 1]), completion([2], [4, 1])]


def own_logprobs(model, completions):
    """The same completions with the model's own log-probabilities, each computed alone."""
    result = []
    for c in completions:
        ids = torch.tensor([c.prompt_ids + c.output_ids])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits
        logprobs, _ = token_logprobs(logits, ids[:, 1:], 1.0)
        result.append(
            completion(c.prompt_ids, c.output_ids, logprobs[0, len(c.prompt_ids) - 1 :].tolist())
        )
    return result


def test_a_batch_marks_the_sampled_tokens_and_only_them():
    batch = make_batch(ragged(), torch.tensor([1.0, 2.0, 3.0]))
    assert [row[mask].tolist() for row, mask in zip(batch.targets, batch.mask, strict=True)] == [
        [5],
        [7, 8, 9, 1],
        [4, 1],
    ]
    assert batch.mask.sum(dim=1).tolist() == [1, 4, 2]
    assert batch.behaviour[~batch.mask].abs().max() == 0


def test_padding_does_not_change_log_probabilities(model):
    batch = make_batch(own_logprobs(model, ragged()), torch.zeros(3))
    stats = Learner(model, GrpoConfig(minibatches=1)).learn(batch)
    assert stats.logprob_gap_max < 1e-5
    assert stats.importance_mean == pytest.approx(1.0, abs=1e-5)


def test_a_wrong_log_probability_shows_as_a_gap(model):
    completions = own_logprobs(model, ragged())
    first = completions[0]
    completions[0] = completion(first.prompt_ids, first.output_ids, [first.logprobs[0] - 0.05])
    stats = Learner(model, GrpoConfig()).learn(make_batch(completions, torch.zeros(3)))
    assert stats.logprob_gap_max == pytest.approx(0.05, abs=1e-4)


def test_learning_makes_good_completions_more_likely_and_bad_ones_less(model):
    good, bad = completion([3, 2], [5, 1]), completion([3, 2], [6, 1])
    before = own_logprobs(model, [good, bad])
    learner = Learner(model, GrpoConfig(minibatches=1, lr_warmup_steps=1))
    learner.learn(make_batch(before, torch.tensor([1.0, -1.0])))
    after = own_logprobs(model, [good, bad])
    assert after[0].logprobs[0] > before[0].logprobs[0]
    assert after[1].logprobs[0] < before[1].logprobs[0]


def test_every_sequence_is_in_one_minibatch_of_each_epoch(model):
    learner, seen, calls = Learner(model, GrpoConfig(minibatches=2, epochs=3)), [], []
    learner._update = lambda batch, proximal, reference: (
        seen.append(batch.inputs.shape[0]),
        Learner._update(learner, batch, proximal, reference),
    )[1]
    batch = make_batch(own_logprobs(model, ragged() * 3), torch.randn(9))
    learner.learn(batch, after_update=lambda: calls.append(1))
    assert seen == [5, 4] * 3
    assert len(calls) == 6


def test_a_reference_policy_holds_the_policy_back(model):
    learner = Learner(model, GrpoConfig(kl_coef=0.1, minibatches=1, lr_warmup_steps=1))
    batch = make_batch(own_logprobs(model, ragged()), torch.tensor([1.0, -1.0, 1.0]))
    assert learner.learn(batch).kl == pytest.approx(0.0, abs=1e-6)
    assert learner.learn(batch).kl > 0


def test_the_learning_rate_warms_up_and_falls_to_its_final_share(model):
    config = GrpoConfig(steps=11, learning_rate=1e-3, lr_warmup_steps=2, lr_final_fraction=0.1)
    learner = Learner(model, config)
    rates = [learner._set_learning_rate()]
    for learner._num_batches in range(1, 14):
        rates.append(learner._set_learning_rate())
    assert rates[0] == pytest.approx(0.5e-3)
    assert max(rates) == rates[1] < 1e-3
    assert rates[10] == rates[-1] == pytest.approx(1e-4)


def test_an_answer_of_the_engine_without_log_probabilities_is_refused():
    meta = {"output_token_logprobs": [], "finish_reason": {"type": "stop"}}
    with pytest.raises(ValueError, match="0 log-probabilities for 2 tokens"):
        parse_completion([3, 2], {"output_ids": [5, 1], "meta_info": meta})


def test_a_completion_that_was_cut_off_is_no_sample():
    meta = {
        "output_token_logprobs": [[-0.5, 5, None]],
        "finish_reason": {"type": "abort", "message": "a pause ended it"},
    }
    with pytest.raises(RolloutError, match=r"after 1 tokens: a pause ended it.*engine\.resume"):
        parse_completion([3, 2], {"output_ids": [5], "meta_info": meta})


@pytest.mark.parametrize("key", ["steps", "samples_per_prompt", "temperature", "minibatches"])
def test_settings_that_cannot_work_are_refused(key):
    with pytest.raises(ValueError, match=key):
        GrpoConfig(**{key: 0})
