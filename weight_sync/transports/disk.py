"""Weights through a folder of safetensors files, which transformers reads as well.

A folder appears under its name whole or not at all: it is written beside it, its `manifest.json` last, and then
renamed, or exchanged with the one that it replaces. The manifest has the fingerprint of every tensor, so a file that
was damaged or exchanged later is refused by name. A folder without one, such as any other checkpoint, can be read too;
then nothing is known against which to check it.
"""

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import FingerprintMismatch, TransportError
from ..layout.checkpoint_folder import INDEX_FILE, StoredTensor, stored_tensors, weight_files
from ..layout.manifest import dtype_name, mismatch
from ..layout.named_tensors import NamedTensors, pairs_of, readable_pair
from ..layout.tensor_sums import tensor_fingerprint

MANIFEST_NAME = "manifest.json"
_FORMAT = "rollout-checkpoint-1"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors$")]


class CheckpointTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of a folder."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Sizes of its dimensions."""
    dtype: str
    """Without the `torch.` prefix."""
    file: _FileName
    """The file of the folder that holds it."""
    fingerprint: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    """64 bits in hexadecimal."""


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.json`."""

    format: str
    """Which layout this is."""
    version: int | None
    """The trainer's version of the weights."""
    label: str | None
    """Its name for them."""
    tensors: tuple[CheckpointTensor, ...]
    """Everything in the folder."""


@dataclass(frozen=True, kw_only=True)
class DiskCheckpoint:
    """A folder that was looked at; its bytes are read when `tensors` is."""

    folder: Path
    """Where it is."""
    manifest: CheckpointManifest | None
    """None: a folder that someone else wrote."""
    stored: Mapping[str, StoredTensor]
    """Every tensor, by name, file by file in the order of their bytes."""

    @property
    def version(self) -> int | None:
        """The trainer's version, where the folder tells."""
        return self.manifest.version if self.manifest else None

    @property
    def label(self) -> str | None:
        """The trainer's label, where the folder tells."""
        return self.manifest.label if self.manifest else None

    @property
    def fingerprints(self) -> dict[str, int] | None:
        """What each tensor's bytes must be, where the folder tells."""
        if self.manifest is None:
            return None
        return {tensor.name: int(tensor.fingerprint, 16) for tensor in self.manifest.tensors}

    @property
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, file by file, a new pass each time; each is checked before it is yielded.

        They lie in the files, whose pages are read as they are looked at, and may be kept.
        """
        expected = (
            {tensor.name: tensor for tensor in self.manifest.tensors} if self.manifest else {}
        )
        for name, stored in self.stored.items():
            tensor = stored.view()
            if name in expected:
                _check(stored.file.path, tensor, expected[name])
            yield name, tensor


def write_checkpoint(
    folder: str | os.PathLike[str],
    named_tensors: NamedTensors,
    *,
    version: int | None = None,
    label: str | None = None,
    max_shard_bytes: int = 4 << 30,
    overwrite: bool = False,
) -> Path:
    """Write tensors, of any layout and device, as a folder of safetensors files of at most `max_shard_bytes` each.

    The folder must not exist, unless `overwrite`; then there is a whole one under its name at any moment, where the
    file system can exchange two names (Linux; not NFS). Iterators may reuse one tensor's memory. Returns the folder's
    path; raises `TransportError` when the disk is full or refuses.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise TransportError(
            f"the folder exists: got {target}, expected a new one; choose another name, or overwrite=True"
        )
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with _disk_errors(target):
        staging.mkdir(parents=True)
    try:
        tensors = _write_shards(staging, pairs_of(named_tensors), max_shard_bytes)
        manifest = CheckpointManifest(
            format=_FORMAT, version=version, label=label, tensors=tuple(tensors)
        )
        with _disk_errors(target):
            _write(staging / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(manifest)))
            _sync_folder(staging)
            _put_in_place(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def read_checkpoint(folder: str | os.PathLike[str]) -> DiskCheckpoint:
    """Look at a folder; `TransportError` when it is incomplete or damaged as far as can be seen without its bytes."""
    path = Path(folder)
    if not path.is_dir():
        raise TransportError(
            f"no checkpoint folder: got {str(path)!r}, expected a folder of safetensors files; check the path"
        )
    manifest = _read_manifest(path)
    if manifest is None:  # someone else's
        stored, problems = stored_tensors(weight_files(path))
    else:
        files = {tensor.name: path / tensor.file for tensor in manifest.tensors}
        if len(files) != len(manifest.tensors):
            raise TransportError(
                f"{path / MANIFEST_NAME} names a tensor twice; write the folder again"
            )
        found, problems = stored_tensors(dict.fromkeys(files.values()))
        stored = {name: found[name] for name in found if name in files}
        problems += [
            f"{name}: not in {file.name}"
            for name, file in files.items()
            if name not in stored or stored[name].file.path != file
        ]
    if problems:
        raise TransportError(
            f"{path} is incomplete:\n  "
            + "\n  ".join(problems)
            + "\nwrite or download the folder again"
        )
    return DiskCheckpoint(folder=path, manifest=manifest, stored=stored)


def _write_shards(
    folder: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> list[CheckpointTensor]:
    """All shards, under names that say how many there are, and the index where there are several."""
    shards: list[list[tuple[str, torch.Tensor, str]]] = []
    names: set[str] = set()
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        with _disk_errors(folder):
            save_file(pending, folder / f"{len(shards)}.partial", metadata={"format": "pt"})
        values = [
            (name, t.to("meta"), f"{tensor_fingerprint(t):016x}") for name, t in pending.items()
        ]
        shards.append(values)
        pending.clear()

    for name, tensor in map(readable_pair, named_tensors):
        if name in names:
            raise mismatch(
                "cannot write a checkpoint", [f"{name}: sent more than once"], "send it once"
            )
        names.add(name)
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > max_shard_bytes:
            flush()
            size = 0
        # A copy of its own: the caller may reuse the memory, and files must not share any.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += num_bytes
    if pending or not shards:
        flush()
    with _disk_errors(folder):
        return _name_shards(folder, shards)


def _name_shards(
    folder: Path, shards: list[list[tuple[str, torch.Tensor, str]]]
) -> list[CheckpointTensor]:
    tensors: list[CheckpointTensor] = []
    for i, values in enumerate(shards):
        single = len(shards) == 1
        file = (
            "model.safetensors" if single else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        )
        os.rename(folder / f"{i}.partial", folder / file)
        _sync_file(folder / file)
        tensors += [
            CheckpointTensor(
                name=name,
                shape=tuple(meta.shape),
                dtype=dtype_name(meta.dtype),
                file=file,
                fingerprint=fingerprint,
            )
            for name, meta, fingerprint in values
        ]
    if len(shards) > 1:
        size = sum(meta.numel() * meta.element_size() for shard in shards for _, meta, _ in shard)
        index = {
            "metadata": {"total_size": size},
            "weight_map": {tensor.name: tensor.file for tensor in tensors},
        }
        _write(folder / INDEX_FILE, json.dumps(index, indent=2).encode())
    return tensors


def _put_in_place(staging: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.replaced")
    if not target.exists():
        os.rename(staging, target)
    elif _exchange(staging, target):
        aside = staging
    else:  # a reader may find neither, for a moment
        os.rename(target, aside)
        os.rename(staging, target)
    _sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Give each the other's name in one go; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at = ctypes.c_int(_AT_FDCWD)
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    return bool(renameat2(at, os.fsencode(one), at, os.fsencode(other), flags) == 0)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TransportError(
            f"cannot write a checkpoint at {path}: got {error}, expected a writable folder with room for all tensors; "
            "free some, or choose another place"
        ) from error


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_manifest(folder: Path) -> CheckpointManifest | None:
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        raw = path.read_bytes()
        manifest = msgspec.json.decode(raw, type=CheckpointManifest)
    except (OSError, msgspec.MsgspecError, ValueError) as error:  # what is no UTF-8, too
        raise TransportError(
            f"{path} cannot be read: {error}; expected what weight_sync.write_checkpoint writes; write it again"
        ) from error
    if manifest.format != _FORMAT:
        raise TransportError(
            f"{path} has another format: got {manifest.format!r}, expected {_FORMAT!r}; write it with this release"
        )
    return manifest


def _check(path: Path, tensor: torch.Tensor, expected: CheckpointTensor) -> None:
    got = (tuple(tensor.shape), dtype_name(tensor.dtype), f"{tensor_fingerprint(tensor):016x}")
    if got != (expected.shape, expected.dtype, expected.fingerprint):
        raise FingerprintMismatch(
            f"{expected.name} in {path} is not what was written: got {got[1]} {list(got[0])} with fingerprint "
            f"{got[2]}, expected {expected.dtype} {list(expected.shape)} with {expected.fingerprint}; the file was "
            "damaged or exchanged: write the folder again"
        )
