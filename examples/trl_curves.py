"""Longer runs of TRL's GRPO and AsyncGRPO with this engine, drawn: reward, and how far trainer and engine differ.

    python examples/trl_curves.py CHECKPOINT --curve docs/trainers/trl_curves.png [--steps 150] [--async-steps 150]

CHECKPOINT is a Hugging Face folder of a small model that sorts digits now and then; `rollout demo` leaves one in
runs/demo-sync/checkpoint-start. Runs on a CPU in minutes; AsyncGRPO there with torch's attention in place of the kernel
that TRL takes from a GPU. Needs `pip install -e '.[trl,demo]'`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.async_grpo import (
    AsyncGRPOConfig,
    AsyncGRPOTrainer,
    async_grpo_trainer,
    packing,
)
from trl_grpo import beginning, exact, prompts

from rollout import Engine
from trainers_integration.trl import RolloutWorker, WeightTransfer, attach

COMMON: dict[str, Any] = {
    "num_generations": 8,
    "max_completion_length": 8,
    "learning_rate": 3e-4,
    "warmup_steps": 10,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
}
GRPO = {"right": "rewards/exact/mean", "apart": "sampling/sampling_logp_difference/max"}
ASYNC = {"right": "rewards/exact", "ratio": "ratio", "staleness": "sample/staleness_max"}


def grpo(path: str, steps: int, batch: int) -> list[dict[str, Any]]:
    """The log of a GRPO run."""
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=steps,
        **COMMON,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=[exact, beginning],
        train_dataset=prompts(4096),
        args=args,
    )
    with Engine(path, executor="local") as engine:
        attach(trainer, engine)
        trainer.train()
    return list(trainer.state.log_history)


def asynchronous(path: str, steps: int, batch: int) -> list[dict[str, Any]]:
    """The log of an AsyncGRPO run, samples at most two updates old."""
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    args = AsyncGRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_staleness=2,
        queue_maxsize=2 * batch,
        token_budget=0,
        gradient_checkpointing=False,
        **COMMON,
    )
    dataset, tokenizer = prompts(4096), AutoTokenizer.from_pretrained(path)
    with Engine(path, executor="local") as engine:
        worker = RolloutWorker(
            engine,
            [exact, beginning],
            train_dataset=dataset,
            args=args,
            processing_class=tokenizer,
        )
        trainer = AsyncGRPOTrainer(
            model=path,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            rollout_worker=worker,
            weight_transfer=WeightTransfer(engine),
        )
        trainer.train()
    return list(trainer.state.log_history)


def attention(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *_: Any, softmax_scale: float, **__: Any
) -> Any:
    """Causal attention within each of the packed segments."""
    parts = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        heads = query.shape[1] // key.shape[1]
        q = query[q0:q1].transpose(0, 1)
        k = key[k0:k1].transpose(0, 1).repeat_interleave(heads, 0)
        v = value[k0:k1].transpose(0, 1).repeat_interleave(heads, 0)
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        part = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=softmax_scale
        )
        parts.append(part.transpose(0, 1))
    return torch.cat(parts)


def picked(log: list[dict[str, Any]], names: dict[str, str]) -> dict[str, list[float]]:
    """One list for each of `names`, of the rows that have all of them."""
    rows = [row for row in log if all(name in row for name in names.values())]
    return {key: [float(row[name]) for row in rows] for key, name in names.items()}


def draw(runs: dict[str, dict[str, list[float]]], path: str) -> None:
    """Right answers of both runs; beneath, how far apart trainer and engine are."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 5), dpi=120, layout="constrained", sharex="col")
    for column, (name, run) in enumerate(runs.items()):
        upper, lower = axes[0][column], axes[1][column]
        upper.plot(run["right"], color="#2563a8", alpha=0.3, linewidth=1)
        upper.plot(smooth(run["right"]), color="#2563a8", linewidth=2)
        upper.set(title=name, ylim=(0, 1), ylabel="share of right answers")
        if "apart" in run:
            lower.semilogy(run["apart"], color="#b4502d", linewidth=1)
            lower.set(ylabel="largest difference of\nlog-probabilities, nats")
        else:
            lower.plot(run["ratio"], color="#b4502d", linewidth=1, label="mean ratio")
            lower.plot(run["staleness"], color="#6b7280", linewidth=1, label="oldest, updates")
            lower.legend(frameon=False, fontsize=8)
        lower.set(xlabel="optimiser step")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def smooth(values: list[float]) -> list[float]:
    """A mean over nine neighbours."""
    windows = [values[max(0, i - 4) : i + 5] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--async-steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=256, help="completions per step")
    parser.add_argument("--curve", required=True, help="the picture; its numbers go beside it")
    options = parser.parse_args()
    path = options.checkpoint
    runs = {
        "GRPO": picked(grpo(path, options.steps, options.batch), GRPO),
        "AsyncGRPO": picked(asynchronous(path, options.async_steps, options.batch), ASYNC),
    }
    Path(options.curve).with_suffix(".json").write_text(json.dumps(runs) + "\n")
    draw(runs, options.curve)
    for name, run in runs.items():
        tenth = max(1, len(run["right"]) // 10)
        first, last = sum(run["right"][:tenth]) / tenth, sum(run["right"][-tenth:]) / tenth
        print(f"{name}: right answers {first:.3f} -> {last:.3f} in {len(run['right'])} steps")
    print(f"GRPO: trainer and engine differ by at most {max(runs['GRPO']['apart']):.1e}")
    print(f"AsyncGRPO: samples at most {max(runs['AsyncGRPO']['staleness']):g} updates old")


if __name__ == "__main__":
    main()
