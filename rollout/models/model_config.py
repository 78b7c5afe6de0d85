"""What a checkpoint's `config.json` says, as the options in which the families differ.

One decoder serves all families. Everything it cannot do is refused here, by name, before anything is built.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..layers.rotary import RopeConfig
from .moe_config import MOE_FAMILIES, MoeConfig, moe_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *MOE_FAMILIES)
ROPE_KINDS = ("default", "linear", "llama3")

_SIZES = """
vocab_size hidden_size intermediate_size head_dim num_attention_heads num_key_value_heads max_position_embeddings
moe_intermediate_size num_experts_per_tok decoder_sparse_step
""".split()
_MAY_BE_ZERO = ("n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace")
_WHOLE = {
    **dict.fromkeys(_SIZES, range(1, 2**30)),
    **dict.fromkeys(_MAY_BE_ZERO, range(2**30)),
    "num_hidden_layers": range(1, 10_001),  # each becomes objects, here and in transformers
    "num_nextn_predict_layers": range(10_001),
}
"""Whole numbers of a configuration, and what they may be."""
_POSITIVE = ("rms_norm_eps", "routed_scaling_factor")
"""Numbers above zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder: sizes, and the options in which families differ."""

    family: str
    """`model_type` of the checkpoint, one of `FAMILIES`."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward layers, where they are dense."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides `num_heads`."""
    head_dim: int
    """Size of a head; need not be hidden_size / num_heads."""
    rms_norm_eps: float
    """Added to the mean square."""
    max_position_embeddings: int
    """Longest context that the model was made for, tokens."""
    rope: RopeConfig
    """Rotary frequencies."""
    tie_word_embeddings: bool
    """The output head is the embedding."""
    qkv_bias: bool
    """q, k and v projections have biases."""
    output_bias: bool
    """The attention's output projection has a bias."""
    mlp_bias: bool
    """Gate, up and down projections have biases."""
    qk_norm: bool
    """Queries and keys are normalised per head, before rotation."""
    sliding_windows: tuple[int | None, ...]
    """For each layer, how many tokens back a query sees, itself included; None: all."""
    num_labels: int | None = None
    """Scores of a sequence, of a sequence-classification checkpoint, which has no output head; None: it generates."""
    moe: MoeConfig | None = None
    """The experts of layers that are not dense; None: all are."""
    num_mtp_layers: int = 0
    """Layers of the checkpoint behind the last one that predict further tokens; they are not loaded."""
    dtype: str | None = None
    """Dtype of the checkpoint without the `torch.` prefix; None when it names none."""

    def differences(self, other: ModelConfig) -> list[str]:
        """How a model of `other` would compute something else with the same weights; one line for each option."""
        indifferent = {"dtype", "max_position_embeddings", "num_mtp_layers"}
        return [
            f"{name}: got {getattr(other, name)}, expected {getattr(self, name)}"
            for name in (field.name for field in dataclasses.fields(self))
            if name not in indifferent and getattr(self, name) != getattr(other, name)
        ]

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, but for biases."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        head = self.vocab_size if self.num_labels is None else self.num_labels
        rows = self.vocab_size + (0 if self.tie_word_embeddings else head)
        num_dense, mixtures = self.num_layers, 0
        if self.moe is not None:
            num_dense -= self.moe.num_layers
            mixtures = self.moe.num_layers * self.moe.num_parameters(self.hidden_size)
        dense = num_dense * 3 * self.hidden_size * self.intermediate_size
        layers = self.num_layers * (self.hidden_size * heads + norms) + dense + mixtures
        return rows * self.hidden_size + layers + self.hidden_size

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` of a checkpoint folder."""
        from transformers import CONFIG_MAPPING

        raw = _read_json(Path(path) / "config.json")
        _refuse_unknown_family(raw.get("model_type"))
        _refuse_numbers(raw.get)
        try:
            config = CONFIG_MAPPING[raw["model_type"]].from_dict({**raw, **_dtype_of(raw)})
            return cls.from_hf(config)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"cannot read {Path(path) / 'config.json'}: got {type(error).__name__}: {error}; expected a "
                f"valid {raw['model_type']} configuration; correct the file"
            ) from error

    @classmethod
    def from_hf(cls, config: PretrainedConfig) -> ModelConfig:
        """The same from a transformers configuration; `CheckpointError` names every feature that is not supported."""
        family = config.model_type
        _refuse_unknown_family(family)
        _refuse_numbers(lambda name: getattr(config, name, None))
        problems: list[str] = []
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if heads % kv_heads:
            problems.append(f"{heads} query heads over {kv_heads} KV heads, which do not divide")
        if head_dim % 2:
            problems.append(f"head_dim {head_dim}, which is odd")
        if config.hidden_act not in ("silu", "swish"):
            problems.append(f"hidden_act {config.hidden_act!r}, only 'silu' is")
        if getattr(config, "quantization_config", None):
            problems.append("quantization_config, only plain floating-point checkpoints are")
        rope = _rope(config, problems)
        if rope.rotary_dim(head_dim) % 2:
            problems.append(
                f"partial_rotary_factor {rope.fraction} of head_dim {head_dim}, which is odd"
            )
        moe = moe_config(config, problems)
        windows = _sliding_windows(config, problems)
        if any(window is not None and window < 1 for window in windows):
            problems.append(f"sliding_window {config.sliding_window}, which sees no token")
        if problems:
            raise CheckpointError(
                f"cannot run this {family} checkpoint; not supported: {'; '.join(problems)}. "
                f"Supported: {', '.join(FAMILIES)} with rope types {', '.join(ROPE_KINDS)}"
            )
        attention_bias = bool(getattr(config, "attention_bias", False))
        dtype = getattr(config, "dtype", None)
        num_labels = _num_labels(config)
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            rope=rope,
            tie_word_embeddings=num_labels is None and bool(config.tie_word_embeddings),
            qkv_bias=_has_qkv_bias(config, attention_bias),
            output_bias=attention_bias and family in ("llama", "qwen3", "qwen3_moe"),
            mlp_bias=family == "llama" and bool(getattr(config, "mlp_bias", False)),
            qk_norm=family in ("qwen3", "qwen3_moe") or bool(getattr(config, "use_qk_norm", False)),
            sliding_windows=windows,
            num_labels=num_labels,
            moe=moe,
            num_mtp_layers=getattr(config, "num_nextn_predict_layers", None) or 0,
            dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
        )


def _num_labels(config: PretrainedConfig) -> int | None:
    """transformers gives every configuration labels; only the architecture tells whether there is a head for them."""
    names = config.architectures or []
    is_classifier = any(name.endswith("ForSequenceClassification") for name in names)
    return int(config.num_labels) if is_classifier else None


def _has_qkv_bias(config: PretrainedConfig, attention_bias: bool) -> bool:
    if config.model_type == "qwen2":
        return True
    if config.model_type == "qwen2_moe":
        return bool(getattr(config, "qkv_bias", True))
    return attention_bias and config.model_type not in ("mistral", "mixtral")


def _dtype_of(raw: Mapping[str, Any]) -> dict[str, str]:
    """The dtype under its present key, whichever of its spellings a file has."""
    for key in ("dtype", "torch_dtype"):
        value = raw.get(key)
        if isinstance(value, str):
            return {"dtype": value.removeprefix("torch.")}
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: got {error}; expected a JSON file; pass the folder of a Hugging Face checkpoint"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"cannot read {path}: got a {type(value).__name__}, expected a JSON object; restore the file"
        )
    return value


def _refuse_unknown_family(model_type: object) -> None:
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"unknown model family: got model_type {model_type!r}, expected one of {', '.join(FAMILIES)}; "
            "use a checkpoint of one of these families"
        )


def _refuse_numbers(value_of: Callable[[str], Any]) -> None:
    """What nothing could be built of, and what would be built for ever; None is for others to judge."""
    for name, allowed in _WHOLE.items():
        value = value_of(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value in allowed):
            raise CheckpointError(
                f"{name} of config.json: got {value!r}, expected a whole number from {allowed[0]} to {allowed[-1]:,}; "
                "correct the file"
            )
    for name in _POSITIVE:
        value = value_of(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise CheckpointError(
                f"{name} of config.json: got {value!r}, expected a number above 0; correct the file"
            )


def _rope(config: PretrainedConfig, problems: list[str]) -> RopeConfig:
    """transformers 5 has moved `rope_theta` and `rope_scaling` of older files into `rope_parameters`.

    Its models settle them once more than reading a file does: only then does `original_max_position_embeddings`
    beside them count.
    """
    config.standardize_rope_params()
    values: Mapping[str, Any] = config.rope_parameters or {}
    kind = values.get("rope_type", "default")
    if any(isinstance(value, Mapping) for value in values.values()):
        problems.append("rope_parameters that differ between layer types")
        return RopeConfig(theta=1.0)
    if kind not in ROPE_KINDS:
        problems.append(f"rope type {kind!r}")
        return RopeConfig(theta=1.0)
    fraction = float(values.get("partial_rotary_factor") or 1.0)
    if fraction != 1.0 and config.model_type != "glm4_moe":
        problems.append(f"partial_rotary_factor {fraction} in a {config.model_type} model")
    theta = float(values.get("rope_theta") or 10_000.0)
    if not 0 < theta < math.inf:
        problems.append(f"rope_theta {theta}, which is no base of frequencies")
    if kind == "default":
        return RopeConfig(theta=theta, fraction=fraction)
    if fraction != 1.0:
        problems.append(f"partial_rotary_factor {fraction} with rope type {kind!r}")
    needed = ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        problems.append(f"rope type {kind!r} without {', '.join(missing)}")
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=float(values["factor"]))
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_max_position=int(values["original_max_position_embeddings"]),
    )


def _sliding_windows(config: PretrainedConfig, problems: list[str]) -> tuple[int | None, ...]:
    """Llama has none; Mistral's is for all layers, as are Mixtral's and Qwen3-MoE's; Qwen's `layer_types` says for
    which (derived from `use_sliding_window` and `max_window_layers` where a file does not spell it out)."""
    num_layers = config.num_hidden_layers
    window = None if config.model_type == "llama" else getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or config.model_type in ("llama", "mistral", "mixtral"):
        everywhere = "full_attention" if window is None else "sliding_attention"
        if kinds is not None and set(kinds) != {everywhere}:
            problems.append(f"layer_types {sorted(set(kinds))} in a {config.model_type} model")
        return (window,) * num_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != num_layers:
        problems.append(f"layer_types {sorted(set(kinds))} for {len(kinds)} of {num_layers} layers")
    if "sliding_attention" in kinds and window is None:
        problems.append("layer_types with sliding_attention, but no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
