"""Prompts as a JSON Lines file: one object per line.

    {"prompt": "314159=", "answer": "113459", "split": "train"}

`split` is "train" or "heldout". Any file of this form can be used instead of the one that the demo writes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rollout.errors import ConfigError

from .task import draw_pairs

SPLITS = ("train", "heldout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of the data set."""

    prompt: str
    """What the model reads."""
    answer: str
    """The only completion that counts as right."""
    split: str
    """"train" or "heldout"."""


def make_dataset(*, num_train: int, num_heldout: int, num_digits: int, seed: int) -> list[Example]:
    """Training and held-out examples; no prompt is in both."""
    pairs = draw_pairs(num_train + num_heldout, num_digits=num_digits, rng=random.Random(seed))
    return [
        Example(prompt=prompt, answer=answer, split="train" if i < num_train else "heldout")
        for i, (prompt, answer) in enumerate(pairs)
    ]


def write_dataset(path: Path, examples: Iterable[Example]) -> None:
    """Write `examples`, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(asdict(example)) + "\n")


def read_dataset(path: Path) -> list[Example]:
    """The examples of a file; a line that is not one is a `ConfigError` with its number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"cannot read the data set {path}: {error.strerror or error}; name a JSONL file, or leave data.path out"
        ) from None
    examples = [
        _parse_line(path, number, line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    for split in SPLITS:
        if not any(e.split == split for e in examples):
            raise ConfigError(
                f"{path} cannot be used: got no line with split {split!r}, expected some of each of {SPLITS}; "
                "mark some lines with it"
            )
    return examples


def _parse_line(path: Path, number: int, line: str) -> Example:
    try:
        fields = json.loads(line)
        example = Example(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}, line {number} is not an example: got {line.strip()[:80]!r} ({error}), expected "
            '{"prompt": str, "answer": str, "split": "train" or "heldout"}; correct that line'
        ) from None
    values = (example.prompt, example.answer, example.split)
    if not all(isinstance(v, str) and v for v in values) or example.split not in SPLITS:
        raise ConfigError(
            f"{path}, line {number} is not an example: got {line.strip()[:80]!r}, expected non-empty strings and a "
            f"split of {SPLITS}; correct that line"
        )
    return example
