"""The weights that a trainer of a test calls version 1, 2, 3, ..., and what transformers computes with them.

They follow from the checkpoint and the number alone, so that a trainer in another process has the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 1e-4


def version_weights(folder: Path, number: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, every element moved by noise of that number; 0: as they are on disk."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    if number:
        generator = torch.Generator().manual_seed(number)
        for name in sorted(tensors):
            tensors[name] += 0.02 * torch.randn(tensors[name].shape, generator=generator)
    return tensors


def in_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint under the names, and in the shapes, in which transformers holds them."""
    held: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    short = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        prefix, found, rest = name.partition(".experts.")
        if not found:
            held[name] = tensor
            continue
        number, kind, _ = rest.split(".")
        matrices = experts.setdefault(f"{prefix}.experts", {}).setdefault(int(number), {})
        matrices[short.get(kind, kind)] = tensor
    for prefix, layer in experts.items():
        each = [layer[number] for number in sorted(layer)]
        both = [torch.cat([one["gate_proj"], one["up_proj"]]) for one in each]
        held[f"{prefix}.gate_up_proj"] = torch.stack(both)
        held[f"{prefix}.down_proj"] = torch.stack([one["down_proj"] for one in each])
    return held


class Reference:
    """transformers' model of a checkpoint, at a version of the test's choice."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval().requires_grad_(False)
        self._folder = folder
        self._number = 0

    def at(self, number: int) -> Reference:
        """This, with the weights of that version."""
        if number != self._number:
            held = self._model.state_dict()
            for name, tensor in in_memory(version_weights(self._folder, number)).items():
                held[name].copy_(tensor)
            self._number = number
        return self

    def rows(self, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities after each of `ids` but the last, (len(ids) - 1, vocabulary)."""
        with torch.no_grad():
            logits = self._model(torch.tensor([list(ids)])).logits[0, :-1].float()
        return torch.log_softmax(logits / temperature, -1)

    def logprobs(self, prompt: Sequence[int], output: Sequence[int], **options: Any) -> list[float]:
        """Log-probability of each token of `output` after `prompt`."""
        rows = self.rows([*prompt, *output], **options)[len(prompt) - 1 :]
        values: list[float] = rows.gather(1, torch.tensor(output)[:, None])[:, 0].tolist()
        return values

    def greedy_problem(self, prompt: Sequence[int], result: Mapping[str, Any]) -> str | None:
        """How a greedy result with log-probabilities differs from this model's, or None where it does not."""
        output = result["output_ids"]
        rows = self.rows([*prompt, *output])[len(prompt) - 1 :]
        best = rows.max(-1)
        if best.indices.tolist() != output:
            return f"tokens: got {output}, expected {best.indices.tolist()}"
        got = torch.tensor(output_logprobs(result))
        gap = float((got - best.values).abs().max())
        return None if gap <= TOLERANCE else f"log-probabilities differ by {gap}"


def output_logprobs(result: Mapping[str, Any]) -> list[float]:
    """Log-probability of each output token of an engine's result."""
    return [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]


def pool_bytes(folder: Path, *, num_blocks: int, block_size: int, tp_size: int = 1) -> int:
    """`kv_cache_bytes` of an engine that shall have `num_blocks` blocks."""
    from rollout.models.model_config import ModelConfig
    from rollout.runner.kv_pool import KVPool

    model = ModelConfig.from_folder(folder)
    return num_blocks * KVPool.bytes_per_block(
        num_layers=model.num_layers,
        block_size=block_size,
        num_kv_heads=max(1, model.num_kv_heads // tp_size),
        head_dim=model.head_dim,
        dtype=torch.float32,
    )


def references() -> Callable[[Path], Reference]:
    """`references()(folder)`: the reference of a checkpoint, read once."""
    made: dict[Path, Reference] = {}

    def find(folder: Path) -> Reference:
        if folder not in made:
            made[folder] = Reference(folder)
        return made[folder]

    return find
