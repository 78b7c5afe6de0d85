"""The project's source files as syntax trees."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

#: Import name -> folder in the checkout.
PACKAGES = {
    "rollout": "rollout",
    "weight_sync": "weight_sync",
    "trainers_integration": "trainers_integration",
    "rollout_kernels": "kernels",
}


@dataclass(frozen=True)
class Source:
    """One Python file of the four packages."""

    path: Path
    """Relative to the checkout."""
    module: str
    """Its import name, for example `rollout.cli.app`; a package is named after its folder."""
    tree: ast.Module
    num_lines: int

    @property
    def package(self) -> str:
        """The package that a relative import of one dot starts from."""
        is_package = self.path.name == "__init__.py"
        return self.module if is_package else self.module.rpartition(".")[0]


def read_source(path: Path, module: str) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(
        path=path.relative_to(CHECKOUT),
        module=module,
        tree=ast.parse(text, str(path)),
        num_lines=len(text.splitlines()),
    )


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


@pytest.fixture(scope="session")
def packages() -> dict[str, str]:
    return PACKAGES


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every Python file of the four packages, in the order of their names."""
    found = []
    for name, folder in PACKAGES.items():
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            parts = path.relative_to(CHECKOUT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(read_source(path, ".".join((name, *parts))))
    assert found
    return found


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """An ordinary Hugging Face folder: a Qwen3 model with random weights, and a tokenizer of characters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 +-=.,?!"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
