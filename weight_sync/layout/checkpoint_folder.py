"""A folder of safetensors files, for the start and for updates from disk: which are a model's weights, what is in them.

Which files count is the rule of transformers: `model.safetensors` alone where it is there, else the files that
`model.safetensors.index.json` names. What else lies in the folder (older weights under another name, adapters, an
optimizer) is no part of the model. Which tensor is in which file is what the files say; the index is believed about
nothing but their names.
"""

import json
import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from ..errors import TransportError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the name that safetensors has for each."""


class MappedFile:
    """A file's bytes as they were when it was opened, also where its name is another file's by now."""

    def __init__(self, path: Path) -> None:
        """`OSError` or `ValueError` where there is nothing to map."""
        self.path = path
        with open(path, "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._elements: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def elements(self, dtype: torch.dtype, first: int) -> torch.Tensor:
        """All that fit from byte `first` on, which is less than one; read as they are looked at, not to be written."""
        key = dtype, first
        if key not in self._elements:
            count = (len(self.memory) - first) // dtype.itemsize
            self._elements[key] = torch.frombuffer(
                self.memory, dtype=dtype, count=count, offset=first
            )
        return self._elements[key]


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One tensor of a file whose header was read and checked."""

    name: str
    """Its name in the file."""
    file: MappedFile
    """The safetensors file."""
    shape: tuple[int, ...]
    """Sizes of its dimensions."""
    dtype: str
    """As safetensors writes it, such as "BF16"."""
    start: int
    """Its first byte in the file."""

    def view(self) -> torch.Tensor:
        """The tensor where it lies in the file; see `MappedFile.elements`."""
        dtype = STORED_DTYPES[self.dtype]
        index, first = divmod(self.start, dtype.itemsize)
        strides, count = [], 1
        for size in reversed(self.shape):
            strides.append(count)
            count *= size
        if not count:
            return torch.empty(self.shape, dtype=dtype)
        return self.file.elements(dtype, first).as_strided(self.shape, strides[::-1], index)


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """What a header says about one tensor."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


_MAX_HEADER_BYTES = 100_000_000
"""As in the library."""
_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)


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
        raise TransportError(_unreadable(file, error)) from error


def stored_tensors(files: Iterable[Path]) -> tuple[dict[str, StoredTensor], list[str]]:
    """What the files hold, by name, in the order of their bytes; and their problems: unreadable files, names in two."""
    stored: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file in files:
        try:
            found = _tensors_of(file)
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            problems.append(_unreadable(file, error))
            continue
        problems += [
            f"{name}: doubled, in {stored[name].file.path.name} and {file.name}"
            for name in sorted(found.keys() & stored.keys())
        ]
        stored |= found
    return stored, problems


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Of one file: a length (8 bytes), a header (JSON), and the tensors' bytes, which lie there without gaps."""
    file = MappedFile(path)
    first = 8 + int.from_bytes(file.memory[:8], "little")
    if first > _MAX_HEADER_BYTES:
        raise ValueError(f"its header would be {first - 8} bytes long")
    header = _HEADER.decode(file.memory[8:first])
    header.pop("__metadata__", None)
    entries = {name: _ENTRY.decode(entry) for name, entry in header.items()}
    found, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in STORED_DTYPES:
            raise ValueError(f"{name} is of {entry.dtype}, which is not known")
        last = end + math.prod(entry.shape) * STORED_DTYPES[entry.dtype].itemsize
        if entry.data_offsets != (end, last):
            raise ValueError(f"{name} is at {entry.data_offsets} and not at {(end, last)}")
        found[name] = StoredTensor(
            name=name, file=file, shape=entry.shape, dtype=entry.dtype, start=first + end
        )
        end = last
    if first + end != len(file.memory):
        raise ValueError(f"it has {len(file.memory)} bytes and not {first + end}")
    return found


def _unreadable(file: Path, error: Exception) -> str:
    return f"{file} cannot be read: {error}; expected a whole safetensors file; write or download it again"
