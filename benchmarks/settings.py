"""Settings of `rollout bench`: the schema of `configs/bench.toml`, of `--config` and of `--set`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Qwen3-shaped model; its weights are made, not read."""

    vocab_size: int = 151_936
    """Rows of the embedding."""
    hidden_size: int = 1024
    """Width."""
    intermediate_size: int = 3072
    """Width of the feed-forward layers."""
    num_layers: int = 28
    """Layers."""
    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int = 8
    """Key and value heads."""
    head_dim: int = 128
    """Size of a head."""
    tied: bool = True
    """The last layer is the embedding."""


LARGE = ModelShape(
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    tied=False,
)
"""Qwen3-8B's shape."""
SMALL = ModelShape(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=7,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
"""25 million parameters."""
TINY = ModelShape(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
"""For `--quick`."""


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """A Qwen3-MoE-shaped model; its weights are made, not read. The default is Qwen3-30B-A3B's, 61 GB in bfloat16."""

    vocab_size: int = 151_936
    """Rows of the embedding."""
    hidden_size: int = 2048
    """Width."""
    num_layers: int = 48
    """Layers, all with experts."""
    num_heads: int = 32
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads."""
    head_dim: int = 128
    """Size of a head."""
    tied: bool = False
    """The last layer is the embedding."""
    num_experts: int = 128
    """Experts of a layer."""
    top_k: int = 8
    """Experts of a token."""
    expert_size: int = 768
    """Inner width of an expert."""


NAMES_OF_30B = MoeShape(
    vocab_size=512, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, expert_size=16
)
"""40 MB in bfloat16."""
TINY_MOE = MoeShape(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=8,
    top_k=2,
    expert_size=32,
)
"""For `--quick`."""


@dataclass(frozen=True, kw_only=True)
class SyncBench:
    """`rollout bench sync`."""

    model: ModelShape = field(default_factory=ModelShape)
    """The model; the default is Qwen3-0.6B's shape, 310 tensors."""
    dtype: str = "bfloat16"
    """Of trainer and engine."""
    num_small: int = 20_000
    """Tensors of the other model, which is nothing but small tensors."""
    small_size: int = 64
    """Rows and columns of each."""
    experts: MoeShape = field(default_factory=lambda: NAMES_OF_30B)
    """The mixture of experts; the default has the 18,867 tensors of Qwen3-30B-A3B, small ones. With no layers it is
    left out."""
    repetitions: int = 15
    """Measured rounds; each does everything that is compared once."""
    warmup: int = 3
    """Rounds before them."""


@dataclass(frozen=True, kw_only=True)
class PauseBench:
    """`rollout bench pause`."""

    model: ModelShape = field(default_factory=ModelShape)
    """The model; the default is Qwen3-0.6B's shape."""
    dtype: str = "bfloat16"
    """Of trainer and engine."""
    batch_size: int = 8
    """Requests that stream at once."""
    prompt_tokens: int = 64
    """Length of each prompt."""
    syncs: int = 15
    """Weight updates during the stream."""
    quiet_s: float = 2.0
    """Seconds of undisturbed streaming between two updates, which the gaps are compared with."""


@dataclass(frozen=True, kw_only=True)
class GenerateBench:
    """`rollout bench generate`."""

    model: ModelShape = field(default_factory=lambda: SMALL)
    """The model; the default has 25 million parameters."""
    dtype: str = "float32"
    """Of both."""
    prompts: int = 64
    """Different prompts."""
    samples: int = 8
    """Samples of each."""
    min_prompt_tokens: int = 32
    """Shortest prompt."""
    max_prompt_tokens: int = 128
    """Longest prompt; lengths are uniform between the two."""
    mean_new_tokens: float = 96.0
    """Mean of the geometric distribution of output lengths, before it is cut."""
    max_new_tokens: int = 512
    """Longest output."""
    temperature: float = 1.0
    """Of both; 0 is greedy."""
    max_running_requests: int = 512
    """Requests that the engine runs at once."""
    peer_batch_sizes: tuple[int, ...] = (16, 32, 64)
    """Batches that transformers gets, one of each size; the best one counts."""
    seed: int = 0
    """Of weights, prompts and lengths."""


@dataclass(frozen=True, kw_only=True)
class PoolBench:
    """`rollout bench pool`."""

    model: ModelShape = field(default_factory=lambda: TINY)
    """The model; the default is so small that what is measured is the control plane."""
    dtype: str = "float32"
    """Of trainer and engines."""
    num_replicas: int = 8
    """Engines, each in a process of its own."""
    repetitions: int = 50
    """Measured updates of each."""
    warmup: int = 5
    """Updates before them."""


@dataclass(frozen=True, kw_only=True)
class GroupBench:
    """`rollout bench group`."""

    model: ModelShape = field(default_factory=ModelShape)
    """The model; the default is Qwen3-0.6B's shape, 310 tensors."""
    dtype: str = "bfloat16"
    """Of trainer and engine."""
    tp_sizes: tuple[int, ...] = (1, 2)
    """Engines to update, one after the other: ranks of each, all members of the trainer's group."""
    bucket_mb: int = 512
    """What the publisher packs before it announces it, MiB; each bucket is one broadcast."""
    stream_counts: tuple[int, ...] = (1, 2, 4)
    """Plain sockets side by side; the count that is fastest in the median says what the loopback allows."""
    repetitions: int = 15
    """Measured rounds for each engine; each does everything that is compared once."""
    warmup: int = 3
    """Rounds before them."""


@dataclass(frozen=True, kw_only=True)
class GpuBench:
    """`rollout bench gpu`."""

    model: ModelShape = field(default_factory=ModelShape)
    """The model; the default is Qwen3-0.6B's shape, 310 tensors."""
    dtype: str = "bfloat16"
    """Of trainer and engine."""
    tp_size: int = 1
    """Ranks of the engine, a GPU each; the trainer has the next one, or shares the last one where there is none."""
    ways: tuple[str, ...] = ("peer_reads", "two_buckets", "nccl", "shared_memory", "gloo")
    """How the bytes go."""
    repetitions: int = 15
    """Measured rounds; each takes every way once."""
    warmup: int = 3
    """Rounds before them."""


@dataclass(frozen=True, kw_only=True)
class GpuGenerateBench:
    """`rollout bench gpu generate`."""

    model: ModelShape = field(default_factory=ModelShape)
    """The model; the default is Qwen3-0.6B's shape."""
    dtype: str = "bfloat16"
    """Of weights and activations."""
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)
    """Requests that decode at once."""
    prompt_tokens: int = 512
    """Length of each prompt, for decode and for the RL shape."""
    decode_tokens: int = 144
    """Tokens that each request decodes; the first 16 steps are not counted."""
    prefill_prompts: int = 64
    """Prompts that are only computed."""
    prefill_tokens: int = 2048
    """Length of each."""
    rl_prompts: int = 64
    """Prompts of the RL shape."""
    rl_samples: int = 8
    """Samples of each."""
    rl_mean_tokens: float = 256.0
    """Mean of the geometric distribution of output lengths, before it is cut."""
    rl_max_tokens: int = 1024
    """Longest output."""
    chunked_prefill_size: int = 8192
    """Tokens of a step at most."""
    kv_cache_gb: float = 40.0
    """Size of the KV pool of each rank, units of 1e9 bytes."""
    tp_size: int = 1
    """Ranks of the engine, a GPU each."""
    deterministic: bool = False
    """Measure the engine that gives the same bits in any batch."""
    disable_custom_all_reduce: bool = False
    """Leave all sums over ranks to NCCL."""
    seed: int = 0
    """Of prompts and lengths."""


@dataclass(frozen=True, kw_only=True)
class GpuExpertsBench:
    """`rollout bench gpu experts`."""

    model: MoeShape = field(default_factory=MoeShape)
    """The model."""
    dtype: str = "bfloat16"
    """Of weights and activations."""
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)
    """Requests that decode at once."""
    prompt_tokens: int = 512
    """Length of each prompt of a decode."""
    decode_tokens: int = 80
    """Tokens that each request decodes; the first 16 steps are not counted."""
    prefill_prompts: int = 16
    """Prompts that are only computed."""
    prefill_tokens: int = 2048
    """Length of each."""
    chunked_prefill_size: int = 8192
    """Tokens of a step at most."""
    kv_cache_gb: float = 20.0
    """Size of the KV pool, units of 1e9 bytes."""
    kernel_tokens: tuple[int, ...] = (1, 8, 64, 256, 1024, 8192)
    """Tokens of a call of the kernels alone; none: leave them out."""
    attention_backend: str = "auto"
    """Of the engine."""
    seed: int = 0
    """Of prompts."""


@dataclass(frozen=True, kw_only=True)
class GpuSyncBench:
    """`rollout bench gpu sync`."""

    small: ModelShape = field(default_factory=ModelShape)
    """The default is Qwen3-0.6B's shape, 310 tensors."""
    large: ModelShape = field(default_factory=lambda: LARGE)
    """The default is Qwen3-8B's shape, 399 tensors; needs 60 GB of a GPU's memory."""
    only: str = ""
    """One of "small", "large" and "experts": leave the others out."""
    budget_s: float = 0.0
    """Seconds after which no further series of a model begins; what is left out is missing in the result. 0: none."""
    dtype: str = "bfloat16"
    """Of trainer and engine."""
    batch_size: int = 8
    """Requests that stream while updates come."""
    kv_cache_mb: int = 1024
    """KV cache of the engine, MiB."""
    quiet_s: float = 0.3
    """Seconds of undisturbed streaming before each update."""
    num_experts: int = 128
    """Experts of a layer in the model of experts; 0: leave it out."""
    expert_layers: int = 48
    """Its layers."""
    expert_width: int = 1024
    """Width."""
    expert_inner: int = 192
    """Inner width of an expert."""
    repetitions: int = 15
    """Measured rounds."""
    cpu_repetitions: int = 5
    """Those from a trainer on the CPU, which take seconds each."""
    warmup: int = 3
    """Rounds before them."""

    @property
    def models(self) -> dict[str, ModelShape]:
        """Those to measure."""
        both = {"small": self.small, "large": self.large}
        return {name: shape for name, shape in both.items() if self.only in ("", name)}


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """`rollout bench serve`."""

    model: ModelShape = field(default_factory=lambda: SMALL)
    """The model; the default has 25 million parameters."""
    concurrency: int = 256
    """Requests at once."""
    prompt_tokens: int = 64
    """Length of each prompt."""
    new_tokens: int = 32
    """Output tokens of each."""
    rounds: int = 5
    """Measured rounds; each does all requests in process and over HTTP."""
    warmup: int = 1
    """Rounds before them."""
    seed: int = 0
    """Of prompts and draws."""

    @property
    def output_tokens(self) -> int:
        """Tokens of a round."""
        return self.concurrency * self.new_tokens


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """One section per sub-command."""

    sync: SyncBench = field(default_factory=SyncBench)
    """What an update costs."""
    pause: PauseBench = field(default_factory=PauseBench)
    """What a client sees of it."""
    generate: GenerateBench = field(default_factory=GenerateBench)
    """Tokens per second."""
    pool: PoolBench = field(default_factory=PoolBench)
    """What an update of many replicas costs."""
    group: GroupBench = field(default_factory=GroupBench)
    """What an update over a process group costs."""
    gpu: GpuBench = field(default_factory=GpuBench)
    """What an update between GPUs costs."""
    gpu_generate: GpuGenerateBench = field(default_factory=GpuGenerateBench)
    """Decode, prefill and the RL shape on one GPU."""
    gpu_experts: GpuExpertsBench = field(default_factory=GpuExpertsBench)
    """A mixture of experts on one GPU."""
    gpu_sync: GpuSyncBench = field(default_factory=GpuSyncBench)
    """What an update on one GPU costs."""
    serve: ServeBench = field(default_factory=ServeBench)
    """What HTTP costs."""


QUICK = (
    *(
        f"{section}.{key}={json.dumps(getattr(TINY, key))}"
        for section in (
            *(
                f"{name}.model"
                for name in ("sync", "pause", "generate", "group", "gpu", "gpu_generate", "serve")
            ),
            *("gpu_sync.small", "gpu_sync.large"),
        )
        for key in ModelShape.__dataclass_fields__
    ),
    *(
        f"gpu_experts.model.{key}={json.dumps(getattr(TINY_MOE, key))}"
        for key in MoeShape.__dataclass_fields__
    ),
    *(
        f"sync.experts.{key}={json.dumps(getattr(TINY_MOE, key))}"
        for key in MoeShape.__dataclass_fields__
    ),
    *("sync.num_small=200", "sync.repetitions=2", "sync.warmup=1"),
    *("pause.batch_size=2", "pause.syncs=2", "pause.quiet_s=0.2"),
    *("generate.prompts=4", "generate.samples=2", "generate.min_prompt_tokens=4"),
    *("generate.max_prompt_tokens=12", "generate.mean_new_tokens=6.0"),
    *("generate.max_new_tokens=16", "generate.peer_batch_sizes=[4, 8]"),
    *("group.tp_sizes=[1]", "group.stream_counts=[1, 2]"),
    *("group.repetitions=2", "group.warmup=1"),
    *("serve.concurrency=8", "serve.prompt_tokens=8", "serve.new_tokens=8", "serve.rounds=2"),
    *("gpu.repetitions=2", "gpu.warmup=1"),
    *("gpu_generate.batch_sizes=[1, 4]", "gpu_generate.prompt_tokens=24"),
    *("gpu_generate.decode_tokens=24", "gpu_generate.prefill_prompts=4"),
    *("gpu_generate.prefill_tokens=64", "gpu_generate.rl_prompts=4"),
    *("gpu_generate.rl_samples=2", "gpu_generate.rl_mean_tokens=8.0"),
    *("gpu_generate.rl_max_tokens=16", "gpu_generate.kv_cache_gb=0.01"),
    *("gpu_experts.batch_sizes=[1, 4]", "gpu_experts.prompt_tokens=24"),
    *("gpu_experts.decode_tokens=24", "gpu_experts.prefill_prompts=4"),
    *("gpu_experts.prefill_tokens=64", "gpu_experts.kv_cache_gb=0.01"),
    "gpu_experts.kernel_tokens=[1, 20]",
    *("gpu_sync.repetitions=2", "gpu_sync.warmup=1", "gpu_sync.quiet_s=0.1"),
    *("gpu_sync.kv_cache_mb=64", "gpu_sync.num_experts=2", "gpu_sync.expert_layers=2"),
    *("pool.num_replicas=2", "pool.repetitions=3", "pool.warmup=1"),
)
"""Overrides of `--quick`: everything small, to see that it works and what it writes."""
