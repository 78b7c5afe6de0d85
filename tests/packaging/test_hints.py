"""Unknown names are answered with what was meant: by meaning and by words before letters."""

import dataclasses

import pytest

from rollout.config import EngineConfig
from rollout.errors import ConfigError
from rollout.hints import SYNONYMS, best_match, did_you_mean
from rollout.settings import load_settings
from trainers_integration.demo.config import DemoConfig
from trainers_integration.grpo.config import GrpoConfig

ENGINE = [field.name for field in dataclasses.fields(EngineConfig)]
GRPO = [field.name for field in dataclasses.fields(GrpoConfig)]


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("lr", GRPO, "learning_rate"),
        ("beta", GRPO, "kl_coef"),
        ("num_generations", GRPO, "samples_per_prompt"),
        ("tp", ENGINE, "tp_size"),
        ("tensor_parallel_size", ENGINE, "tp_size"),
        ("max_model_len", ENGINE, "context_length"),
        ("gpu_memory_utilization", ENGINE, "mem_fraction_static"),
        ("max-running-requests", ENGINE, "max_running_requests"),
        ("TP_SIZE", ENGINE, "tp_size"),
        ("max_runing_requests", ENGINE, "max_running_requests"),
        ("prefix_cache", ENGINE, "enable_prefix_cache"),
        ("page_size", ENGINE, "block_size"),
        ("tensor_paralel_size", ENGINE, "tp_size"),
        ("gpu_memory_utilisation", ENGINE, "mem_fraction_static"),
    ],
)
def test_a_name_is_answered_with_the_one_that_means_it(name, known, meant):
    assert best_match(name, known) == meant
    assert did_you_mean(name, known) == f"did you mean {meant!r}?"


def test_a_name_that_means_nothing_here_gets_the_list():
    assert best_match("zebra", GRPO) is None
    assert did_you_mean("zebra", ["one", "two"]) == "known are one, two"


def test_synonyms_never_hide_a_name_that_is_known():
    for known in (ENGINE, GRPO):
        assert all(best_match(name, known) == name for name in known)


def test_every_group_of_synonyms_has_more_than_one_name():
    assert all(len(group) > 1 for group in SYNONYMS)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("grpo.lr=1", "grpo.learning_rate"),
        ("grpo.beta=1", "grpo.kl_coef"),
        ("grpo.warmup=1", "grpo.lr_warmup_steps"),
        ("eval.samples=1", "eval.samples_per_prompt"),
    ],
)
def test_keys_of_settings_are_answered_by_meaning_too(override, meant):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        load_settings(DemoConfig, None, [override])
