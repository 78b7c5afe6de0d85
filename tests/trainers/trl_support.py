"""The sorting task for TRL's trainers: a checkpoint that is right now and then, its data set, its reward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainers_integration.demo.config import ModelConfig, WarmStartConfig
from trainers_integration.demo.data import make_dataset
from trainers_integration.demo.environment import SortingEnvironment
from trainers_integration.demo.model import build_model, save_checkpoint, warm_start
from trainers_integration.demo.tokenizer import build_tokenizer
from weight_sync import WeightPublisher

NUM_DIGITS = 4
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments }}{% endfor %}{% endfor %}"
)
DIFFERENCE = "sampling/sampling_logp_difference/max"


def write_checkpoint(folder: Path) -> list[Any]:
    """A small model after some supervised steps, right in a quarter of all samples; returns the task's examples."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    examples = make_dataset(num_train=512, num_heldout=32, num_digits=NUM_DIGITS, seed=0)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    environment = SortingEnvironment(
        examples, tokenizer, max_new_tokens=NUM_DIGITS + 1, partial_credit=0.0, seed=0
    )
    model = build_model(ModelConfig(hidden_size=64, num_layers=2), seed=0)
    warm = WarmStartConfig(target_pass_rate=0.25, batch_size=64, learning_rate=2e-3)
    warm_start(model, tokenizer, environment.training, warm, seed=0)
    save_checkpoint(folder, model, tokenizer)
    return examples


def data(examples: list[Any], *, conversational: bool = False, split: str = "train") -> Any:
    """A data set as TRL wants it."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": e.prompt}] if conversational else e.prompt,
                "answer": e.answer,
            }
            for e in examples
            if e.split == split
        ]
    )


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for the sorted digits, else 0."""
    return [float(text_of(c) == a) for c, a in zip(completions, answer, strict=True)]


def poison(engine: Any) -> None:
    """Weights that the trainer never had: whoever samples from them shows it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        engine.model_path, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with WeightPublisher(engine) as publisher:
        publisher.publish(model, label="poison")


def settings(kind: Any, folder: Path, **options: Any) -> Any:
    """`GRPOConfig` or `RLOOConfig` for a short run on the CPU that writes nothing but its log."""
    given: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": NUM_DIGITS + 1,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "beta": 0.0,
    }
    return kind(**{**given, **options})


def make_trainer(kind: str, folder: Path, dataset: Any, **options: Any) -> Any:
    """A trainer of TRL for the checkpoint in `folder`; `args` in options are those of its settings."""
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = settings(getattr(trl, f"{kind}Config"), folder, **options.pop("args", {}))
    return getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=options.pop("reward_funcs", exact),
        args=args,
        train_dataset=dataset,
        processing_class=options.pop("tokenizer", None) or AutoTokenizer.from_pretrained(folder),
        **options,
    )


def right_answers(model: Any, examples: list[Any]) -> float:
    """The probability of the right answer under a model, a mean over examples: what the sampled reward is a guess of.

    No sampling is in it, so that a policy that has learned shows it for certain.
    """
    tokenizer = build_tokenizer()
    found = []
    with torch.no_grad():
        for example in examples[:128]:
            prompt = tokenizer(example.prompt)["input_ids"]
            answer = [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + answer])).logits[0].float()
            rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
            found.append(rows.gather(1, torch.tensor(answer)[:, None]).sum().exp().item())
    return sum(found) / len(found)


def logged(trainer: Any, name: str) -> list[float]:
    """The values of one metric, in order."""
    return [row[name] for row in trainer.state.log_history if name in row]


def async_settings(folder: Path, **options: Any) -> Any:
    """`AsyncGRPOConfig` for a short run on the CPU."""
    from trl.experimental.async_grpo import AsyncGRPOConfig

    given: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": NUM_DIGITS + 1,
        "learning_rate": 5e-4,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_staleness": 2,
        "queue_maxsize": 256,
    }
    return AsyncGRPOConfig(**{**given, **options})


def load(folder: Path) -> Any:
    """The checkpoint's model, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def noise(folder: Path) -> Any:
    """A policy that seldom ends its completions."""
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def wait_until(true: Callable[[], Any], *, timeout_s: float = 60.0) -> None:
    """Wait for what comes soon."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def run_ranks(checkpoint: Path, folder: Path, mode: str) -> list[dict[str, Any]]:
    """What both ranks of `trl_rank.py` said."""
    script = Path(__file__).with_name("trl_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(checkpoint), str(folder), mode],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(ranks, answers, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]
