"""`lm_eval` itself, `local-completions`, against a server in another process: its numbers are transformers' own.

Its tasks usually come from a hub; those here are made here, one for each kind of request that there is.
"""

import string

import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

QUESTIONS = [
    {"question": "the heron", "choices": [" waits", " the other one", "é"], "answer": 0},
    {"question": "one, two,", "choices": [" three", " on the lane"], "answer": 0},
    {"question": "then", "choices": ["a", "b", "c", " than"], "answer": 3},
]
TEXTS = [{"text": "the heron stands in the rain"}, {"text": "é" * 20}, {"text": "x"}]
LENGTH = 128
CLOSE = {"rel": 1e-5, "abs": 1e-5}
"""Sums of a few dozen float32 log-probabilities, from two implementations."""


def tasks(questions):
    """New ones: an evaluation writes into its tasks."""
    common = {"test_split": "test", "num_fewshot": 0}
    asked = {"doc_to_text": "{{question}}", **common}
    choices = {
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
    }
    drawn = {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["q", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "doc_to_target": "the",
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    }
    return [
        task("choosing", questions, output_type="multiple_choice", **choices, **asked),
        task("drawing", questions, **drawn, **asked),
        task("rolling", TEXTS, **rolling, **common),
    ]


def task(name, rows, **fields):
    data = DatasetDict({"test": Dataset.from_list(rows)})
    return ConfigurableTask(config={"task": name, "custom_dataset": lambda **_: data, **fields})


def evaluate(questions, model, **options):
    """(metrics, the model's answers), both by task."""
    found = simple_evaluate(
        model,
        tasks=tasks(questions),
        task_manager=TaskManager(include_defaults=False),  # Thousands of files otherwise.
        bootstrap_iters=0,
        **options,
    )
    answers = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], answers


def likely_answer(model, tokenizer):
    """A question of which the model's most likely next token is text that becomes that token again."""
    for letter in string.ascii_letters:
        logits = model(torch.tensor([tokenizer(letter).input_ids])).logits[0, -1]
        word = tokenizer.decode([logits.argmax()])
        if word.isprintable() and tokenizer(word).input_ids == [logits.argmax()]:
            return {"question": letter, "choices": ["~", word], "answer": 1}
    raise AssertionError("no letter has a printable successor")


@pytest.fixture(scope="module")
def evaluated(folder, reference_model):
    """(questions, metrics, answers) of the model in this process."""
    model, tokenizer = reference_model(folder), AutoTokenizer.from_pretrained(folder)
    questions = [*QUESTIONS, likely_answer(model, tokenizer)]
    local = HFLM(model, tokenizer=tokenizer, max_length=LENGTH)
    return questions, *evaluate(questions, local)


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_backend": "huggingface"},
        {"tokenizer_backend": "remote", "num_concurrent": 8},
        {"tokenizer_backend": "huggingface", "batch_size": 4},
        {"tokenizer_backend": "huggingface", "tokenized_requests": False},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_an_evaluation_over_http_is_that_of_the_model_itself(server, folder, evaluated, options):
    questions, wanted_metrics, wanted = evaluated
    arguments = {"model": str(folder), "base_url": f"{server.url}/v1/completions"}
    metrics, answers = evaluate(
        questions, "local-completions", model_args={**arguments, **options, "max_length": LENGTH}
    )
    assert answers["drawing"] == wanted["drawing"]
    likelihoods, wanted_likelihoods = flat(answers), flat(wanted)
    assert [greedy for _, greedy in likelihoods] == [greedy for _, greedy in wanted_likelihoods]
    assert {greedy for _, greedy in likelihoods} == {False, True}
    assert [value for value, _ in likelihoods] == pytest.approx(
        [value for value, _ in wanted_likelihoods], **CLOSE
    )
    for name, scores in wanted_metrics.items():
        numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
        assert {key: metrics[name][key] for key in numbers} == pytest.approx(numbers, **CLOSE)
    assert wanted_metrics["choosing"]["acc,none"] > 0


def flat(answers):
    """(log-likelihood, whether the answer is the most likely one) of every choice, and of every rolled text."""
    chosen = [tuple(choice[0]) for row in answers["choosing"] for choice in row]
    return chosen + [(row[0][0], False) for row in answers["rolling"]]
