"""Tiny checkpoints that tests of all groups share: random models of every family with a byte-level tokenizer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # for `versions`

TINY = {
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
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("o", "n"), ("r", "e"))


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


def tiny_model(family: str, **overrides: Any) -> Any:
    """A random transformers model in float32; norms and biases are random too, so that leaving one out shows."""
    import torch
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    num_labels = overrides.get("num_labels")  # given: a classifier with so many
    config = CONFIG_MAPPING[family](**{**TINY, **overrides})
    torch.manual_seed(int.from_bytes(hashlib.sha256(family.encode()).digest()[:4], "little"))
    auto = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer), alpha=0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family, **config)`: a Hugging Face folder with weights and tokenizer.

    Made once per session for the same arguments: read it, do not write to it. `max_shard_size` goes to
    `save_pretrained`, every other keyword to the configuration.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    made: dict[str, Path] = {}

    def make(family: str, *, max_shard_size: str = "5GB", **overrides: Any) -> Path:
        key = repr((family, max_shard_size, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
            tiny_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference_model() -> Callable[[Path], Any]:
    """`reference_model(folder)`: the transformers model of a checkpoint, float32, read once per session."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: dict[Path, Any] = {}

    def load(folder: Path) -> Any:
        if folder not in loaded:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            loaded[folder] = model.eval().requires_grad_(False)
        return loaded[folder]

    return load


@pytest.fixture(scope="module", autouse=True)
def _one_ray_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray clusters of one machine share files that say which is the current one: test processes take turns."""
    if not request.path.stem.startswith(("test_ray", "test_examples")):
        yield
        return
    with open(Path(tempfile.gettempdir()) / "rollout-tests-ray.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
