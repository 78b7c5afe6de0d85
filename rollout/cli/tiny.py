"""`rollout tiny`: a checkpoint of random weights that fits everywhere, to try everything else with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..hints import did_you_mean

EPILOG = """[bold]Examples[/bold]

  rollout tiny tiny

  rollout tiny mixture --family qwen3_moe

  rollout tiny reward --labels 1

  rollout generate --model tiny "Once upon a time"
"""

SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("o", "n"), ("r", "e"))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny(
    folder: Annotated[Path, typer.Argument(help="Where to write it; new, or an empty folder.")],
    family: Annotated[str, typer.Option(help="Model family, as in config.json.")] = "qwen3",
    labels: Annotated[
        int | None,
        typer.Option(min=1, help="A classifier with so many scores, such as a reward model."),
    ] = None,
) -> None:
    """Write a tiny checkpoint: random weights, a tokenizer for any text, a chat template; 1 MB or less.

    What it generates means nothing, but every command, call and route works on it as on a real one.
    """
    from ..models.model_config import FAMILIES

    if family not in FAMILIES:
        raise ConfigError(f"--family: got {family!r}; {did_you_mean(family, FAMILIES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"FOLDER: got {str(folder)!r}, which is there already, expected a new or an empty folder; name another"
        )
    options = {} if labels is None else {"num_labels": labels}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tiny_checkpoint(folder, family, **EXPERTS.get(family, {}), **options)
    except OSError as error:
        raise ConfigError(
            f"FOLDER: got {str(folder)!r}, expected a folder that can be written to: {error}"
        ) from error
    typer.echo(f"{folder}: a {family} checkpoint; try: rollout generate --model {folder} hello")


def save_tiny_checkpoint(folder: Path, family: str = "qwen3", **config: Any) -> None:
    """Write the checkpoint; `config`: options of the family's configuration."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny_model(family, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model(family: str, **config: Any) -> Any:
    """A random transformers model in float32, a classifier with `num_labels`; the same for the same family and sizes.

    Norms and biases are random too, so that leaving one out shows.
    """
    import torch
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    auto = AutoModelForSequenceClassification if "num_labels" in config else AutoModelForCausalLM
    settings = CONFIG_MAPPING[family](**{**SIZES, **config})
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int.from_bytes(hashlib.sha256(family.encode()).digest()[:4], "little"))
        model = auto.from_config(settings, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.add_(torch.randn_like(buffer), alpha=0.2)
    return model.requires_grad_(False)


def tiny_tokenizer() -> Any:
    """Byte-level: any text survives a round trip, and some characters take several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary |= {token: 256 + i for i, token in enumerate(special)}
    vocabulary |= {"".join(pair): 259 + i for i, pair in enumerate(MERGES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
