"""What this adapter relies on in TRL, checked before a step is trained.

`attach` uses attributes that TRL does not promise. So the version is checked, the method that generates is looked into
for the names it must use, and a difference is one error that says what to install.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from rollout import Engine
from rollout.errors import ConfigError

VERSION = "1.16"
"""The release series this was read in and is tested with."""
INSTALL = f"install that series: pip install 'trl=={VERSION}.*'"

_GENERATES = "_generate_single_turn"
_USED_THERE = ("use_vllm", "vllm_generation", "_last_loaded_step", "sync_weights", "generate")
"""Names that the generating method must use, or what `attach` sets would change nothing."""
_ATTRIBUTES = (
    *("accelerator", "args", "model", "state", "processing_class", "eos_token_ids", "use_vllm"),
    *("num_generations", "num_generations_eval", "max_completion_length"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "_dist", "_is_vlm"),
)


def check_version() -> None:
    """`ConfigError` unless TRL is installed, in the series that this adapter knows."""
    try:
        import trl
    except ImportError as error:
        raise ConfigError(
            f"the TRL adapter cannot be used: got no trl ({error}), expected {VERSION}; {INSTALL}"
        ) from error
    if trl.__version__.split(".")[:2] != VERSION.split("."):
        raise ConfigError(
            f"the TRL adapter cannot be used: got trl {trl.__version__}, expected {VERSION}, whose private attributes "
            f"it sets; {INSTALL}"
        )


_PRIVATE = {
    "sharded parameters": (
        "trl.generation.vllm_generation",
        ("VLLMGeneration._init_vllm", "VLLMGeneration._iter_named_params"),
    ),
    "conversations": (
        "trl.experimental.async_grpo.async_rollout_worker",
        ("TurnRecord", "parse_response", "_chain_to_sequences"),
    ),
}
"""What else is private and used: to gather sharded parameters, and to make training rows of conversations."""


def check_private(purpose: str) -> None:
    """`ConfigError` unless TRL has what is used for "sharded parameters", or for "conversations"."""
    module, names = _PRIVATE[purpose]
    found = importlib.import_module(module)
    missing = [name for name in names if not _has(found, name)]
    if missing:
        raise ConfigError(
            f"the TRL adapter cannot be used for {purpose}: got a {module} without {', '.join(missing)}, expected trl "
            f"{VERSION}'s; {INSTALL}"
        )


def _has(owner: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        owner = getattr(owner, name, None)
    return owner is not None


def check_engine(engine: Any) -> None:
    """`ConfigError` unless `engine` is one, or an address."""
    if not isinstance(engine, (Engine, str)):
        raise ConfigError(
            f"got {type(engine).__name__} for the engine, expected an Engine, a RolloutPool, or "
            "the address of one; pass one of these"
        )


def check_trainer(trainer: Any) -> None:
    """`ConfigError` unless `trainer` is one that `attach` knows, made as it must be."""
    check_version()
    from trl import GRPOTrainer, RLOOTrainer

    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer)):
        raise ConfigError(
            f"attach: got a {type(trainer).__name__}, expected a GRPOTrainer or RLOOTrainer; AsyncGRPOTrainer takes "
            "rollout_worker=RolloutWorker(...) and weight_transfer=WeightTransfer(...)"
        )
    missing = [name for name in _ATTRIBUTES if not hasattr(trainer, name)]
    method = inspect.unwrap(getattr(type(trainer), _GENERATES, check_trainer))
    unused = sorted(set(_USED_THERE) - set(method.__code__.co_names))
    if missing or unused:
        raise ConfigError(
            f"attach: {type(trainer).__name__} is not as expected of trl {VERSION}: missing attributes {missing}, "
            f"names that {_GENERATES} does not use {unused}; {INSTALL}, and leave that method as it is"
        )
    _check_options(trainer)


def _check_options(trainer: Any) -> None:
    args = trainer.args
    if trainer.use_vllm:
        raise ConfigError(
            "attach: got use_vllm=True, expected False: the engine takes vLLM's place, and one engine is enough; leave "
            "use_vllm out, and make a new trainer for another engine"
        )
    if trainer._is_vlm:
        raise ConfigError(
            "attach: got a model with images, expected one of text; this engine generates from text alone"
        )
    if getattr(args, "vllm_structured_outputs_regex", None) is not None:
        raise ConfigError(
            "attach: got vllm_structured_outputs_regex, expected None; this engine has no constrained decoding"
        )
    mode = getattr(args, "vllm_importance_sampling_mode", None)
    if (
        getattr(args, "loss_type", None) == "vespo"
        and args.vllm_importance_sampling_correction
        and mode not in ("token_truncate", "token_mask")
    ):  # As the trainer checks it where it makes its own generation.
        raise ConfigError(
            f"attach: got vllm_importance_sampling_mode={mode!r} with the loss 'vespo', expected 'token_truncate' or "
            "'token_mask'; set one of them"
        )
