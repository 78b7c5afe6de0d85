"""The loop against a real engine in a process of its own."""

import dataclasses

import pytest
import torch

from rollout import Engine
from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.data import make_dataset
from trainers_integration.demo.environment import SortingEnvironment
from trainers_integration.demo.model import build_model, save_checkpoint
from trainers_integration.demo.tokenizer import build_tokenizer
from trainers_integration.grpo.config import GrpoConfig
from trainers_integration.grpo.environment import Score
from trainers_integration.grpo.learner import Learner
from trainers_integration.grpo.loop import GrpoLoop
from weight_sync import WeightPublisher, fingerprint

CONFIG = GrpoConfig(
    steps=4,
    prompts_per_step=8,
    samples_per_prompt=4,
    max_new_tokens=6,
    prompts_in_flight=2,
    minibatches=2,
)


class VariedRewards(SortingEnvironment):
    """Rewards that differ between samples, so that every batch has a gradient: an untrained policy sorts nothing."""

    def score(self, problem, completion):
        ids = completion.output_ids
        return Score(reward=sum(ids) % 7 / 6, passed=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(
        folder, build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0), build_tokenizer()
    )
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    with Engine(
        checkpoint, executor="local", seed=0, num_threads=1, kv_cache_bytes=8 << 20
    ) as engine:
        with WeightPublisher(engine) as publisher:  # noise, until a loop publishes its policy
            noise = build_model(ModelConfig(hidden_size=32, num_layers=2), seed=1)
            publisher.publish(noise, version=1, label="1")
        yield engine


@pytest.fixture
def publisher(engine):
    with WeightPublisher(engine) as publisher:
        yield publisher


def make_loop(engine, publisher, checkpoint):
    """A loop whose policy is what the engine serves: the checkpoint, published first where an older test moved on."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if publisher is not None:
        version = int(engine.get_weight_version()) + 1
        publisher.publish(model, version=version, label=str(version))
    examples = make_dataset(num_train=64, num_heldout=4, num_digits=3, seed=0)
    environment = VariedRewards(
        examples, build_tokenizer(), max_new_tokens=6, partial_credit=0.5, seed=0
    )
    return GrpoLoop(engine, publisher, Learner(model, CONFIG), environment)


def test_in_the_synchronous_mode_the_engine_samples_from_the_trainers_policy(
    engine, publisher, checkpoint
):
    loop = make_loop(engine, publisher, checkpoint)
    first = loop.version
    records = list(loop.synchronous(4))
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert max(record.learn.logprob_gap_max for record in records) < 1e-4
    assert all(record.staleness == 0 and record.mixed_fraction == 0 for record in records)
    assert [record.syncs[0].version for record in records] == [first + i for i in (1, 2, 3, 4)]
    assert all(record.learn.importance_mean == pytest.approx(1, abs=1e-4) for record in records)


def test_after_each_step_the_engine_serves_the_trainers_weights(engine, publisher, checkpoint):
    loop = make_loop(engine, publisher, checkpoint)
    for _ in loop.synchronous(2):
        assert engine.weights_fingerprint() == fingerprint(loop.learner.model)
        assert engine.get_weight_version() == str(loop.version)


def test_in_the_asynchronous_mode_completions_say_which_versions_sampled_them(
    engine, publisher, checkpoint
):
    loop = make_loop(engine, publisher, checkpoint)
    first = loop.version
    records = list(loop.asynchronous(4))
    assert engine.weights_fingerprint() == fingerprint(loop.learner.model)
    # One sync after each of the two optimiser steps of a batch.
    assert [sync.version for r in records for sync in r.syncs] == list(range(first + 1, first + 9))
    assert records[0].staleness == 0
    assert all(0 < record.staleness <= 2 for record in records[1:])
    for record in records:
        for completion in record.completions:
            ends = [0, *(span.end for span in completion.spans)]
            assert [span.start for span in completion.spans] == ends[:-1]
            assert ends[-1] == len(completion.output_ids) == len(completion.token_times)
            versions = [span.version for span in completion.spans]
            assert versions == sorted(set(versions))
            assert first <= versions[0] <= versions[-1] <= first + 8


def test_the_first_batch_of_the_asynchronous_mode_is_the_trainers_own(
    engine, publisher, checkpoint
):
    loop = make_loop(engine, publisher, checkpoint)
    gaps = [record.learn.logprob_gap_max for record in loop.asynchronous(3)]
    assert gaps[0] < 1e-4 < gaps[-1]


def test_without_a_publisher_the_engine_stays_as_it_is(engine, publisher, checkpoint):
    make_loop(engine, publisher, checkpoint)
    served, version = engine.weights_fingerprint(), engine.get_weight_version()
    control = make_loop(engine, None, checkpoint)
    records = list(control.synchronous(2))
    assert (engine.weights_fingerprint(), engine.get_weight_version()) == (served, version)
    assert fingerprint(control.learner.model) != served
    assert all(record.syncs == () for record in records)
    # What it learns from is no longer its own policy, and that shows.
    assert records[0].learn.logprob_gap_max < 1e-4 < records[1].learn.logprob_gap_max


def test_a_line_of_metrics_is_plain_json(engine, publisher, checkpoint):
    import json

    (record,) = make_loop(engine, publisher, checkpoint).synchronous(1)
    row = json.loads(json.dumps(record.as_row()))
    assert row["step"] == 1
    assert row["syncs"][0]["version"] == record.syncs[0].version
    assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["step_s"])
    assert "completions" not in row


def test_in_the_continuous_mode_groups_come_as_they_finish_and_old_ones_are_left_out(
    engine, publisher, checkpoint
):
    loop = make_loop(engine, publisher, checkpoint)
    loop.config = dataclasses.replace(loop.config, max_staleness=3)
    first = loop.version
    records = list(loop.continuous(5))
    assert loop.version == first + 10  # two updates a step
    assert engine.weights_fingerprint() == fingerprint(loop.learner.model)
    version = first
    for record in records:
        assert len(record.completions) == 8 * 4
        oldest = min(span.version for c in record.completions for span in c.spans)
        assert version - 3 <= oldest <= version
        assert 0 <= record.staleness <= 3
        version += 2
    assert engine.status().num_running == 0  # what was under way was aborted

    loop.config = dataclasses.replace(loop.config, max_staleness=0)
    strict = list(loop.continuous(3))
    assert all(record.staleness <= 0 for record in strict)
    assert sum(record.num_dropped for record in strict) > 0
