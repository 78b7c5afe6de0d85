"""Settings of `rollout demo`: the schema of `configs/demo.toml` and of `--set`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..grpo.config import GrpoConfig, PpoConfig

Algorithm = Literal["grpo", "ppo"]
Mode = Literal["sync", "async", "continuous"]
ModelKind = Literal["dense", "moe"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts."""

    path: Path | None = None
    """JSONL file with your own prompts and answers (digits and "="); None: the demo writes one."""
    num_digits: int = 6
    """Digits to sort, in the file that the demo writes."""
    num_train: int = 4096
    """Training prompts in that file."""
    num_heldout: int = 256
    """Held-out prompts in that file; none of them is a training prompt."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model."""

    kind: ModelKind = "dense"
    """"dense", or "moe": a mixture of experts in every layer, Qwen3-MoE-shaped."""
    num_experts: int = 8
    """Experts of a layer, of a mixture."""
    experts_per_token: int = 2
    """How many of them a token goes to."""
    hidden_size: int = 96
    """Width."""
    num_layers: int = 3
    """Layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key and value heads."""
    max_position_embeddings: int = 64
    """Longest prompt plus completion, tokens."""


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervised steps before RL."""

    target_pass_rate: float = 0.28
    """Stop when sampling is expected to be right this often."""
    max_steps: int = 300
    """Stop then in any case."""
    batch_size: int = 128
    """Examples per step."""
    learning_rate: float = 1e-3
    """Of AdamW."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measuring the sampled pass rate on held-out prompts."""

    every: int = 25
    """Steps between measurements; the first and the last weights are measured in any case."""
    samples_per_prompt: int = 2
    """Samples of each held-out prompt."""
    final_samples_per_prompt: int = 8
    """The same for the first and the last weights."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything about one run of the demo."""

    name: str | None = None
    """The run's folder below `runs_dir`, whose files are overwritten; None: `demo-sync`, `demo-ppo-async` and so on."""
    runs_dir: Path = Path("runs")
    """Where runs are written."""
    algorithm: Algorithm = "grpo"
    """"grpo": compare the samples of a prompt with each other; "ppo": with what a critic expected."""
    mode: Mode = "sync"
    """"sync": generate, learn, publish in turn; "async": generate batch k + 1 while learning from batch k;
    "continuous": take groups as they finish, and leave out those that are too old."""
    seed: int = 0
    """Seed of data, weights, batches and sampling; the same seed repeats a synchronous run."""
    control_steps: int = 30
    """Steps of the control, whose weights are never synced; 0: no control."""
    in_flight_steps: int = 6
    """Steps at the end that are sampled while weights arrive, for the timeline; after the last measurement."""
    partial_credit: float = 0.5
    """Most reward of a wrong answer, for a right beginning; 0: exact match alone."""
    trainer_threads: int = 1
    """CPU threads of the trainer; more than are free make it slower, for they wait for each other."""
    engine_threads: int = 1
    """CPU threads of the engine's process."""
    max_running_requests: int = 512
    """Requests that the engine runs at once."""
    data: DataConfig = DataConfig()
    """Prompts."""
    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """Supervised steps before RL."""
    eval: EvalConfig = EvalConfig()
    """Measurements on held-out prompts."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """The RL itself, whatever the algorithm."""
    ppo: PpoConfig = field(default_factory=PpoConfig)
    """What PPO has beside it."""

    @property
    def folder(self) -> Path:
        """Where this run is written."""
        kind = self.mode if self.algorithm == "grpo" else f"{self.algorithm}-{self.mode}"
        return self.runs_dir / (self.name or f"demo-{kind}")
