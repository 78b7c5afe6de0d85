"""A folder of safetensors files, for the start and for updates from disk: which are a model's weights, what is in them.

Which files count is the rule of transformers: `model.safetensors` alone where it is there, else the files that
`model.safetensors.index.json` names. What else lies in the folder (older weights under another name, adapters, an
optimizer) is no part of the model. Which tensor is in which file is what the files say; the index is believed about
nothing but their names.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import TransportError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor, as the header of its file describes it."""

    file: Path
    """The safetensors file."""
    shape: tuple[int, ...]
    """Sizes of its dimensions."""
    dtype: str
    """As safetensors writes it, such as "BF16"."""


def weight_files(folder: Path) -> list[Path]:
    """The files, sorted; they may turn out to be missing. `TransportError` where the folder names none."""
    single = folder / SINGLE_FILE
    if single.is_file():
        return [single]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise TransportError(
            f"no weights in {folder}: got neither {SINGLE_FILE} nor {INDEX_FILE}, expected one of these *.safetensors "
            "names; save the model with save_pretrained, or use load_format='dummy'"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # A name that leads out of the folder is a file of that name in it, which then is not there.
        return sorted(folder / Path(name).name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TransportError(
            f"cannot read {index}: got {type(error).__name__}: {error}; expected a JSON object with a weight_map of "
            "names to files; download the checkpoint again"
        ) from error


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """What `safetensors.safe_open` gives, on the CPU; `TransportError` where the file cannot be read."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise TransportError(
            f"{file} cannot be read: {error}; expected a whole safetensors file; write or download it again"
        ) from error


def stored_tensors(files: Iterable[Path]) -> tuple[dict[str, StoredTensor], list[str]]:
    """What the headers of the files say, by name; and their problems: unreadable files, names in two of them."""
    stored: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file in files:
        try:
            with opened(file) as tensors:
                for name in tensors.keys():
                    if name in stored:
                        problems.append(
                            f"{name}: doubled, in {stored[name].file.name} and {file.name}"
                        )
                    part = tensors.get_slice(name)
                    stored[name] = StoredTensor(
                        file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype()
                    )
        except TransportError as error:
            problems.append(str(error))
    return stored, problems
