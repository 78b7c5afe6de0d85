"""TRL's GRPOTrainer with this engine: the one line that is not TRL's own is `attach(trainer, engine)`.

    python examples/trl_grpo.py CHECKPOINT [--steps 150] [--curve curve.png]

CHECKPOINT is a Hugging Face folder of a small model that sorts digits now and then; `rollout demo` leaves one in
runs/demo-sync/checkpoint-start. Needs `pip install -e '.[trl]'`.
"""

import argparse
import random
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rollout import Engine
from trainers_integration.trl import attach


def exact(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 for the sorted digits, else 0."""
    return [float(got == expected) for got, expected in zip(completions, answer, strict=True)]


def beginning(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Up to a half for a right beginning, so that a group in which nobody is right can still be compared."""
    return [0.5 * matching(*pair) / len(pair[1]) for pair in zip(completions, answer, strict=True)]


def matching(got: str, right: str) -> int:
    """How many characters are right before one is wrong."""
    return next((i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), len(got))


def prompts(count: int, num_digits: int = 6) -> Dataset:
    rng = random.Random(0)
    rows = [[rng.randrange(10) for _ in range(num_digits)] for _ in range(count)]
    return Dataset.from_list(
        [
            {"prompt": "".join(map(str, row)) + "=", "answer": "".join(map(str, sorted(row)))}
            for row in rows
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=256, help="completions per step")
    parser.add_argument("--curve", help="draw the reward into this file")
    options = parser.parse_args()
    path = options.checkpoint

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=[exact, beginning],
        train_dataset=prompts(4096),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=options.batch,
            num_generations=8,
            max_completion_length=8,
            learning_rate=3e-4,
            warmup_steps=10,
            max_steps=options.steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
    )
    with Engine(path, executor="local") as engine:  # in a process of its own
        attach(trainer, engine)
        trainer.train()
        print(engine.weight_version, "was sampled from last")

    rows = [row for row in trainer.state.log_history if "reward" in row]
    rewards = [row["rewards/exact/mean"] for row in rows]
    difference = max(row["sampling/sampling_logp_difference/max"] for row in rows)
    tenth = max(1, len(rewards) // 10)
    first, last = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
    print(
        f"right answers {first:.3f} -> {last:.3f}; trainer and engine differ by at most {difference:.1e}"
    )
    if options.curve:
        draw(rewards, options.curve)


def draw(rewards: list[float], path: str) -> None:
    import matplotlib.pyplot as plt

    smooth = [
        sum(rewards[max(0, i - 4) : i + 5]) / len(rewards[max(0, i - 4) : i + 5])
        for i in range(len(rewards))
    ]
    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=130, layout="constrained")
    axes.plot(rewards, color="#2563a8", alpha=0.3, linewidth=1)
    axes.plot(smooth, color="#2563a8", linewidth=2)
    axes.set(xlabel="optimiser step", ylabel="share of right answers", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
