"""What the demo starts from: data set, task, tokenizer, model, checkpoint."""

import json
import random

import pytest
import torch

from rollout.errors import ConfigError
from trainers_integration.demo.config import ModelConfig, WarmStartConfig
from trainers_integration.demo.data import Example, make_dataset, read_dataset, write_dataset
from trainers_integration.demo.environment import SortingEnvironment
from trainers_integration.demo.model import build_model, save_checkpoint, warm_start
from trainers_integration.demo.task import draw_pairs, reward
from trainers_integration.demo.tokenizer import build_tokenizer
from trainers_integration.grpo.rollouts import Completion


def dataset():
    return make_dataset(num_train=50, num_heldout=10, num_digits=4, seed=0)


def environment(examples=None, **changes):
    settings = {"max_new_tokens": 6, "partial_credit": 0.5, "seed": 0, **changes}
    return SortingEnvironment(examples or dataset(), build_tokenizer(), **settings)


def answered(problem, text, end=True):
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id] * end
    return Completion(
        prompt_ids=problem.prompt_ids,
        output_ids=tuple(ids),
        logprobs=(0.0,) * len(ids),
        spans=(),
        finish_reason="stop",
        latency_s=0.0,
        token_times=(),
    )


def test_answers_are_the_digits_in_order():
    for prompt, answer in draw_pairs(20, num_digits=5, rng=random.Random(0)):
        assert prompt.endswith("=")
        assert answer == "".join(sorted(prompt[:-1]))


def test_no_prompt_is_both_trained_on_and_held_out():
    examples = dataset()
    assert len({e.prompt for e in examples}) == len(examples) == 60
    assert sum(e.split == "heldout" for e in examples) == 10


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="more digits"):
        draw_pairs(11, num_digits=1, rng=random.Random(0))


def test_a_data_set_survives_its_file(tmp_path):
    path = tmp_path / "data.jsonl"
    write_dataset(path, dataset())
    assert read_dataset(path) == dataset()
    assert json.loads(path.read_text().splitlines()[0]).keys() == {"prompt", "answer", "split"}


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"prompt": "12="}',
        '{"prompt": "12=", "answer": "12", "split": "test"}',
        '{"prompt": "12=", "answer": 12, "split": "train"}',
        '{"prompt": "12=", "answer": "12", "split": "train", "extra": 1}',
        "[1]",
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    write_dataset(path, dataset())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match="line 61"):
        read_dataset(path)


def test_a_data_set_without_held_out_prompts_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    write_dataset(path, [e for e in dataset() if e.split == "train"])
    with pytest.raises(ConfigError, match="heldout"):
        read_dataset(path)


def test_a_data_set_that_is_not_there_is_an_error_for_people(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl"):
        read_dataset(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [("1a=", "1", "'a'"), ("1234567=", "1234567", "max_new_tokens")],
)
def test_a_prompt_that_the_model_cannot_handle_is_refused(prompt, answer, message):
    with pytest.raises(ConfigError, match=message):
        environment([Example(prompt=prompt, answer=answer, split="train")])


def test_every_training_prompt_comes_once_before_any_comes_again():
    env = environment()
    drawn = [p.prompt_ids for _ in range(5) for p in env.draw(10)]
    assert sorted(drawn) == sorted(p.prompt_ids for p in env.training)
    assert not set(drawn) & {p.prompt_ids for p in env.heldout}


def test_two_environments_of_one_seed_draw_the_same():
    assert environment().draw(30) == environment().draw(30)
    assert environment().draw(30) != environment(seed=1).draw(30)


def test_only_the_exact_answer_that_ends_there_passes():
    env = environment()
    (problem,) = env.draw(1)
    right = env.score(problem, answered(problem, problem.answer))
    assert (right.reward, right.passed) == (1.0, True)
    for text, end in ((problem.answer, False), (problem.answer + "1", True), ("", True)):
        wrong = env.score(problem, answered(problem, text, end))
        assert not wrong.passed
        assert wrong.reward < 0.5


def test_partial_credit_grows_with_the_right_beginning_and_stays_below_its_limit():
    texts = ["", "9", "1", "12", "1239", "123", "1234"]
    rewards = [reward(text, "1234", ended=False, partial_credit=0.5) for text in texts]
    assert rewards == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.3, 0.4])
    assert reward("123", "1234", ended=True, partial_credit=0.0) == 0.0
    assert reward("1234", "1234", ended=True, partial_credit=0.5) == 1.0


def test_the_checkpoint_is_one_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = build_model(ModelConfig(hidden_size=32), seed=3), build_tokenizer()
    save_checkpoint(tmp_path, model, tokenizer)
    assert list(tmp_path.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.model_type == "qwen3"
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    read = AutoTokenizer.from_pretrained(tmp_path)
    ids = read.encode("314=")
    assert ids == tokenizer.encode("314=")
    assert len(ids) == 4
    assert read.decode([*ids, read.eos_token_id]) == "314=<eos>"
    assert loaded.config.eos_token_id == read.eos_token_id


def test_a_model_is_made_from_its_seed():
    config = ModelConfig(hidden_size=32, num_layers=1)
    first, again, other = (build_model(config, seed=s).lm_head.weight for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_warm_start_stops_when_its_target_is_reached():
    problems = environment(make_dataset(num_train=40, num_heldout=4, num_digits=2, seed=0)).training
    config = WarmStartConfig(target_pass_rate=0.1, max_steps=200, batch_size=32, learning_rate=3e-3)
    model = build_model(ModelConfig(hidden_size=32, num_layers=1), seed=0)
    steps, rate = warm_start(model, build_tokenizer(), problems, config, seed=0)
    assert 0 < steps < 200
    assert 0.1 <= rate < 0.2


def test_the_warm_start_gives_up_at_its_limit():
    config = WarmStartConfig(target_pass_rate=0.9, max_steps=2, batch_size=4)
    model = build_model(ModelConfig(hidden_size=32, num_layers=1), seed=0)
    steps, rate = warm_start(model, build_tokenizer(), environment().training, config, seed=0)
    assert steps == 2
    assert rate < 0.9
