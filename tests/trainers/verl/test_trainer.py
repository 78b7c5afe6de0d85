"""verl's own trainer with our engine as its rollout, on a CPU that `examples/verl_on_cpu.py` gives it."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STEPS = 2
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **others):
    return sum(letter.isalpha() for letter in solution_str) / 16
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\\n{{ m['content'] }}<|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)


@pytest.fixture
def job(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A folder with a model whose tokenizer has the tokens that verl wants of a Qwen, prompts and a reward."""
    import pandas
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": f"say {number}"}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": number},
        }
        for number in range(16)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "prompts.parquet")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def overrides(job: Path) -> list[str]:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    settings = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": job / "prompts.parquet",
        "data.val_files": job / "prompts.parquet",
        "data.train_batch_size": 8,
        "data.max_prompt_length": 32,
        "data.max_response_length": 16,
        "data.dataloader_num_workers": 0,
        "actor_rollout_ref.model.path": job / "model",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        f"{actor}.strategy": "fsdp2",
        f"++{actor}.fsdp_config.mixed_precision": "{param_dtype: fp32, reduce_dtype: fp32}",
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"{actor}.ppo_mini_batch_size": 8,
        f"{actor}.ppo_micro_batch_size_per_gpu": 8,
        f"{actor}.optim.lr": 1e-3,
        f"{rollout}.name": "rollout_sync",
        f"{rollout}.n": 4,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.dtype": "float32",
        f"{rollout}.max_model_len": 128,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": 8,
        f"{rollout}.agent.num_workers": 1,
        f"+{rollout}.engine_kwargs.rollout_sync": "{kv_cache_bytes: 4194304, num_threads: 1}",
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": job / "reward.py",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": 1,
        "trainer.device": "cpu",
        "trainer.logger": '["console"]',
        "trainer.total_training_steps": STEPS,
        "trainer.val_before_train": False,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": job / "checkpoints",
        "ray_kwargs.ray_init.num_cpus": 32,
        "+ray_kwargs.ray_init.num_gpus": 4,
        "+ray_kwargs.ray_init.include_dashboard": False,
    }
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.mark.timeout(1000)
def test_grpo_trains_and_agrees_with_the_engine_in_every_step(job: Path) -> None:
    environment = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(job)],
        env=environment,
        cwd=job,
        capture_output=True,
        text=True,
        timeout=900,
    )
    text = ran.stdout + ran.stderr
    assert ran.returncode == 0, text[-4000:]
    steps = re.findall(r"step:\d+ - .*", text)
    assert len(steps) == STEPS, text[-4000:]
    values = [dict(re.findall(r"([\w/]+):(-?[\d.e+-]+)", step)) for step in steps]
    # Of probabilities: the trainer computes in float32, padded, the engine in its own order.
    worst = [float(step["training/rollout_probs_diff_max"]) for step in values]
    assert max(worst) < 1e-4, json.dumps(values[0], indent=1)
    assert all(float(step["actor/grad_norm"]) > 0 for step in values)
