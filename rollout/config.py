"""What the user asks for (`EngineConfig`) and what the engine runs with (`ResolvedConfig`).

The first is frozen as it was given. Resolving it looks at the model and the machine and makes the second, in which no
`None` that means "choose for me" is left; it is logged once at start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

LoadFormat = Literal["auto", "safetensors", "dummy", "sharded_state"]
ExecutorKind = Literal["inline", "local", "ray"]
KvPolicy = Literal["keep", "recompute", "flush"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that `rollout.Engine(...)` takes; the defaults of the command line come from here."""

    model_path: str
    """Folder with `config.json` and, unless `load_format` is "dummy", safetensors files."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer; None: the model's folder."""
    skip_tokenizer_init: bool = False
    """Work on token ids alone: `text` is empty, and string prompts and stop strings are refused."""
    load_format: LoadFormat = "auto"
    """Where the first weights come from; "dummy": seeded random values, the same in every parallel layout."""
    await_first_update: bool | None = None
    """Refuse to generate (`NoUpdateYetError`) until a complete update has come; None: with load_format "dummy", whose
    weights are random. False: generate with what was loaded."""
    dtype: str = "auto"
    """Parameter and activation dtype, such as "bfloat16"; "auto": the checkpoint's."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:1"; "auto": CUDA where there is a GPU."""
    tp_size: int = 1
    """Tensor-parallel ranks."""
    ep_size: int = 1
    """Over how many of these the experts of a layer are spread, whole; a divisor of `tp_size`. With 1 every rank holds
    a part of every expert."""
    seed: int | None = None
    """Seed of requests that bring no `sampling_seed`, and of dummy weights; None: another one at every start, which
    `status()` tells, and 0 for dummy weights."""
    context_length: int | None = None
    """Longest prompt plus output in tokens; None: the model's own limit."""
    max_running_requests: int = 256
    """Requests that run at once; more wait in the queue."""
    kv_cache_bytes: int | None = None
    """Size of the KV pool; None: from `mem_fraction_static`."""
    mem_fraction_static: float | None = None
    """Share of free memory: for weights and KV pool on a GPU (None: what the largest step leaves, which is measured at
    start), for the pool alone on a CPU (None: 0.25)."""
    block_size: int | None = None
    """Tokens per KV block; None: 16 on a CPU, 64 on a GPU, whose kernels fetch whole blocks, and 256 for "flash"."""
    chunked_prefill_size: int | None = None
    """Tokens computed in one step at most, prefill and decode together; None: 2048 on a CPU and 8192 on a GPU."""
    attention_backend: str = "auto"
    """What computes attention: "torch" on any device, "triton" on CUDA, "flash" (torch's FlashAttention) on CUDA with
    torch 2.12 or later; "auto": triton on CUDA, else torch."""
    overlap: bool | None = None
    """Launch a step before the tokens of the last are known; None: on CUDA."""
    disable_cuda_graph: bool = False
    """On CUDA, launch every kernel of a decode step by itself; starts sooner and needs less memory."""
    disable_custom_all_reduce: bool = False
    """On CUDA with several ranks, leave sums of small tensors to NCCL instead of memory that all ranks see."""
    deterministic: bool = False
    """Tokens and log-probabilities of a request have the same bits in any batch, chunking and prefix hit, which are
    those of `trainers_integration.on_policy`. One rank on CUDA; slower."""
    enable_return_routed_experts: bool = False
    """Keep which experts each cached token went to, for `generate(return_routed_experts=True)`."""
    enable_prefix_cache: bool = True
    """Keep the blocks of finished requests for later prompts with the same beginning and weight version."""
    executor: ExecutorKind = "inline"
    """Where the engine loop runs: the caller's process, child processes, or Ray actors."""
    weight_version: str | None = None
    """Label of the first weights; None: "0"."""
    kv_policy: KvPolicy = "keep"
    """What a weight commit does with KV computed by the old version, where the update does not say."""
    keep_previous_weights: bool = False
    """Keep a copy of the last version, so that a commit that fails half-way rolls back instead of leaving TORN."""
    pause_lease_s: float = 300.0
    """Seconds after which a pause ends by itself, where `pause_generation` names none."""
    listen: str | None = None
    """Address for trainers and clients in other processes, such as "tcp://127.0.0.1:0"; None: a private socket file.
    Beyond this machine, and with "?key_file=PATH" behind it, `Engine.address` has the key that they must have."""
    insecure: bool = False
    """Let everybody in who can reach `listen`, without a key, and through any folder."""
    num_threads: int | None = None
    """CPU threads of a child process; None: torch's default."""
    log_level: str | None = None
    """What engine processes log on standard error, such as "INFO"; None: ROLLOUT_LOG_LEVEL, else "WARNING"."""
    log_interval_s: float | None = None
    """Seconds between log lines about throughput, while there is work; None: no such lines."""
    start_timeout_s: float = 120.0
    """Seconds that a child process may take until it is ready."""
    request_timeout_s: float = 600.0
    """Deadline of a call to the engine that names none; `generate` has none, see `progress_timeout_s`."""
    progress_timeout_s: float = 600.0
    """Seconds without a step, also in a pause, after which calls of `generate` end with what they have."""
    ray_num_cpus: float = 1.0
    """CPUs that Ray sets aside for each rank of executor "ray"."""
    ray_num_gpus: float | None = None
    """GPUs for each rank, or the share of one that a colocated trainer leaves; None: 1 on CUDA, 0 on a CPU."""
    ray_node_id: str | None = None
    """Node that must hold the ranks; None: any with room for all of them."""
    ray_placement_group: str | None = None
    """Name of a placement group of the caller's, such as the trainer's; None: one of the engine's own."""
    ray_first_bundle: int = 0
    """Bundle of that group for rank 0; the other ranks take the ones that follow."""

    @property
    def awaits_first_update(self) -> bool:
        """Whether nothing is generated before a complete update has come."""
        if self.await_first_update is None:
            return self.load_format == "dummy"
        return self.await_first_update


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """`EngineConfig` after a look at the model and the machine; nothing is left to choose."""

    user: EngineConfig
    """What was asked for."""
    dtype: str
    """Parameter dtype without the `torch.` prefix."""
    device: str
    """Device with its index where it has one."""
    context_length: int
    """Longest prompt plus output, tokens."""
    num_blocks: int
    """Blocks of the KV pool."""
    block_size: int
    """Tokens per block."""
    chunked_prefill_size: int
    """Tokens computed in one step at most."""
    attention_backend: str
    """What computes attention."""
    overlap: bool
    """Steps are launched one ahead."""
    kv_cache_bytes: int
    """Bytes of the KV pool, all layers."""
    vocab_size: int
    """Size of the model's vocabulary."""
    weight_version: str
    """Label of the first weights."""
    seed: int
    """Of requests that bring none; the same on all ranks."""
    num_labels: int | None = None
    """Scores of a sequence that `classify` returns; None: the model generates."""


def default_block_size(device: str, attention_backend: str) -> int:
    """Tokens per KV block where the configuration leaves them open."""
    if attention_backend == "flash":
        return 256
    return 64 if device.startswith("cuda") else 16


def free_memory_bytes() -> int:
    """Memory of this machine that is free now, in bytes (`MemAvailable` where the kernel tells, else free pages)."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
