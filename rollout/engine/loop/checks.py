"""What can be refused before anything is started: one typed line each, from names, numbers and headers alone."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from weight_sync.wire.keys import Address, is_on_this_machine, require_curve
from weight_sync.wire.messages import MAX_LABEL_CHARS

from ...config import EngineConfig, default_block_size, free_memory_bytes
from ...errors import ConfigError
from ...layers.shards import split_evenly, split_kv_heads
from ...layers.single_group import split_experts
from ...models.checkpoint_files import CheckpointFiles
from ...models.model_config import ModelConfig
from ...runner.attention_backend import BackendNeeds
from ...runner.backend_registry import check_backend, resolve_backend
from ...runner.kv_pool import KVPool
from ...tokenizer import check_tokenizer_files, is_unicode
from .ranks import RankSpec, device_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MOST_REQUESTS = 65_535
"""Rows that kernels over a step's logits have room for in one launch."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_start(config: EngineConfig) -> None:
    """Everything about `config` that can be known here, in the process of the caller, in a few milliseconds.

    Raises `ConfigError` or `CheckpointError`. With executor "ray" the ranks see other disks and devices, so only what
    lies here is looked at.
    """
    here = config.executor != "ray"
    if not here and not Path(config.model_path).is_dir():
        return
    check_config(config)
    model = ModelConfig.from_folder(config.model_path)
    dtype = check_dtype(config, model)
    _check_split(config, model)
    if config.load_format in ("auto", "safetensors"):
        CheckpointFiles(config.model_path).raise_problems()
    if not config.skip_tokenizer_init:
        check_tokenizer_files(config.tokenizer_path or config.model_path)
    if here:
        for rank in range(config.tp_size):
            device = device_of(RankSpec(rank=rank, size=config.tp_size), _device(config))
        check_attention(config, model, DTYPES[dtype], device)
        _check_memory(config, model, DTYPES[dtype], device)


def check_attention(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: str
) -> None:
    """`ConfigError` where the backend that was asked for cannot serve on `device`, or cannot hold what was."""
    _check_deterministic(config, device)
    block_size = config.block_size or default_block_size(device, config.attention_backend)
    check_backend(
        resolve_backend(config.attention_backend, device),
        BackendNeeds(
            device=torch.device(device),
            dtype=dtype,
            head_dim=model.head_dim,
            block_size=block_size,
        ),
    )


def _check_deterministic(config: EngineConfig, device: str) -> None:
    """`ConfigError` where `deterministic` was asked for and cannot be held on `device`."""
    if not config.deterministic:
        return
    backend = resolve_backend(config.attention_backend, device)
    got = [f"attention_backend {backend!r} on {device}"] if backend != "triton" else []
    got += [f"tp_size {config.tp_size}"] if config.tp_size > 1 else []
    if got:
        raise ConfigError(
            f"deterministic: got {' and '.join(got)}, expected 'triton' on CUDA and one rank, whose kernels keep an "
            "order of their own; leave it out elsewhere"
        )


def check_dtype(config: EngineConfig, model: ModelConfig) -> str:
    """The dtype that is meant, without the `torch.` prefix; `ConfigError` for one that is not served."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = model.dtype or _dtype_of_files(config) or "float32"
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype: got {config.dtype!r}, expected 'auto' or one of {', '.join(DTYPES)}; choose one of these"
        )
    return dtype


_AT_LEAST_ONE_OR_NONE = (
    *("context_length", "kv_cache_bytes", "num_threads"),
    *("chunked_prefill_size", "block_size"),
)


_DAY_S = 86_400
#: What messages between processes, and clocks, can carry.
_MOST_SECONDS = {
    "start_timeout_s": 7 * _DAY_S,
    "request_timeout_s": 7 * _DAY_S,
    "progress_timeout_s": 7 * _DAY_S,
    "pause_lease_s": _DAY_S,
    "log_interval_s": 7 * _DAY_S,
}


def check_config(config: EngineConfig) -> None:
    """Ranges that a type cannot express; one error for each field."""
    _check_folder("model_path", config.model_path)
    if config.tokenizer_path is not None and not config.skip_tokenizer_init:
        _check_folder("tokenizer_path", config.tokenizer_path)
    for name in ("max_running_requests", "tp_size", "ep_size"):
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{name}: got {value}, expected at least 1")
    if config.max_running_requests > _MOST_REQUESTS:
        got, most = config.max_running_requests, _MOST_REQUESTS
        raise ConfigError(f"max_running_requests: got {got}, expected at most {most}; lower it")
    for name in _AT_LEAST_ONE_OR_NONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: got {value}, expected at least 1, or None to choose")
    if config.tp_size > 1 and config.executor == "inline":
        raise ConfigError(
            f"tp_size: got {config.tp_size} with executor 'inline', expected 1; use executor='local' or 'ray'"
        )
    fraction = config.mem_fraction_static
    if fraction is not None and not 0 < fraction < 1:
        raise ConfigError(f"mem_fraction_static: got {fraction}, expected a number within (0, 1)")
    for name, most in _MOST_SECONDS.items():
        value = getattr(config, name)
        if value is not None and not 0 < value <= most:
            raise ConfigError(
                f"{name}: got {value}, expected a positive number of seconds, at most {most}"
            )
    _check_listen(config.listen, config.insecure)
    if config.seed is not None and not -(1 << 63) <= config.seed < 1 << 63:
        raise ConfigError(f"seed: got {config.seed}, expected a number of 64 bits")
    label = config.weight_version or ""
    if len(label) > MAX_LABEL_CHARS or not is_unicode(label):
        raise ConfigError(
            f"weight_version: got {len(label)} characters, expected at most {MAX_LABEL_CHARS}, whole ones; shorten it"
        )
    level = config.log_level
    if level is not None and level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"log_level: got {level!r}, expected one such as 'INFO' or 'WARNING'")


def _dtype_of_files(config: EngineConfig) -> str | None:
    if config.load_format not in ("auto", "safetensors"):
        return None
    return CheckpointFiles(config.model_path).dtype


def _check_folder(what: str, path: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        return
    if folder.exists():
        raise ConfigError(f"{what}: got the file {path!r}, expected its folder; pass that")
    if _HUB_ID.fullmatch(path) and not folder.parent.is_dir():
        raise ConfigError(
            f"{what}: got {path!r}, expected a folder; this looks like a model of a hub, which is not downloaded here: "
            f"fetch it first (`hf download {path} --local-dir FOLDER`), and pass the folder"
        )
    raise ConfigError(
        f"{what}: got {path!r}, which is not there, expected a folder with config.json; check the path"
    )


def _check_listen(listen: str | None, insecure: bool) -> None:
    if listen is None:
        return
    try:
        place = Address.of_server(listen)
    except ValueError as error:
        raise ConfigError(f"listen: {error}") from None
    if not insecure and not is_on_this_machine(place.endpoint):
        require_curve()
    scheme, _, rest = place.endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    is_tcp = scheme == "tcp" and host and port.isdigit() and int(port) < 65536
    if not is_tcp and not (scheme == "ipc" and rest):
        raise ConfigError(
            f"listen: got {listen!r}, expected an address such as 'tcp://127.0.0.1:0' (0: any free port) or "
            "'ipc:///tmp/folder/socket'; correct it, or leave it out for a private socket file"
        )


def _device(config: EngineConfig) -> str:
    """The configured device, if torch knows such a one and this engine runs on it."""
    if config.device == "auto":
        return "auto"
    try:
        kind = torch.device(config.device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise ConfigError(
            f"device: got {config.device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'; choose one of these"
        )
    return config.device


@dataclass(frozen=True, slots=True)
class _OneOf:
    """As much of a tensor-parallel group as splitting sizes needs."""

    size: int
    rank: int = 0


def _check_split(config: EngineConfig, model: ModelConfig) -> None:
    """Every size that is split over ranks divides."""
    tp = _OneOf(config.tp_size)
    split_evenly("num_attention_heads", model.num_heads, tp)
    split_kv_heads(model.num_kv_heads, tp)
    if config.tp_size % config.ep_size:
        raise ConfigError(
            f"ep_size: got {config.ep_size} with tp_size {config.tp_size}, expected a divisor of it; experts are "
            "spread over the tensor-parallel ranks"
        )
    moe = model.moe
    if moe is None or not all(moe.layers):
        split_evenly("intermediate_size", model.intermediate_size, tp)
    if moe is None and config.ep_size > 1:
        raise ConfigError(
            f"ep_size: got {config.ep_size} for a {model.family} model, expected 1: it has no experts"
        )
    if moe is None and config.enable_return_routed_experts:
        raise ConfigError(
            f"enable_return_routed_experts: got True for a {model.family} model, expected False: it has no experts"
        )
    if moe is not None:
        ep, sharing = split_experts(tp, config.ep_size)
        split_evenly("the number of experts (ep_size)", moe.router.num_experts, ep)
        split_evenly("moe_intermediate_size", moe.intermediate_size, sharing)
        split_evenly("the width of the shared expert", moe.shared_size, tp)


def kv_block(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: str
) -> tuple[int, int]:
    """Tokens of one KV block, and its bytes on one rank, all layers."""
    block_size = config.block_size or default_block_size(device, config.attention_backend)
    num_bytes = KVPool.bytes_per_block(
        num_layers=model.num_layers,
        block_size=block_size,
        num_kv_heads=max(1, model.num_kv_heads // config.tp_size),
        head_dim=model.head_dim,
        dtype=dtype,
    )
    return block_size, num_bytes


def _check_memory(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: str
) -> None:
    """A pool that was asked for by its size has room for a block, and there is that much memory."""
    wanted = config.kv_cache_bytes
    if wanted is None:
        return
    block_size, block_bytes = kv_block(config, model, dtype, device)
    context = config.context_length or model.max_position_embeddings
    if wanted < 2 * block_bytes:
        raise ConfigError(
            f"kv_cache_bytes: got {wanted}, expected at least two blocks of {block_bytes} bytes; raise it"
        )
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory_bytes()
    ranks_here = 1 if on_gpu else config.tp_size
    if wanted * ranks_here > free:
        per_request = -(-context // block_size) * block_bytes
        raise ConfigError(
            f"kv_cache_bytes: got {wanted:,} for each of {ranks_here} ranks, expected at most the "
            f"{free // ranks_here:,} bytes that are free on {device}; lower it (a request of {context} tokens takes "
            f"{per_request:,})"
        )
