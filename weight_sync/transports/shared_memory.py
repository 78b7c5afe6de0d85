"""Trainer and engine on one machine: an anonymous memory file, mapped by both.

The file never has a name, so nothing is left behind however either process ends: the kernel frees it with the last
mapping. It is sealed against shrinking, so that a trainer cannot make the engine fault while it reads. The engine opens
it through `/proc/<pid>/fd/<fd>`, which needs the same user (or the right to trace the trainer), and believes nothing:
kind of file, seals, size, and a random nonce in the header are checked before the first byte is used.
"""

import fcntl
import os
import secrets
import struct

import torch

from ..devices.registration import Registration
from ..errors import TransportError
from ..wire.messages import ProcessRef, SharedMemoryHandle
from ..wire.process import current_process, host_id, why_dead
from .arena import Mapping, SharedBytes

HEADER_BYTES = 4096
"""One page in front of the tensors."""
_HEADER = struct.Struct("<16sQ16s")
_MAGIC = b"rollout-arena-01"
_NAME = "weight-arena"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemoryArena(SharedBytes):
    """The trainer's end."""

    def __init__(self, num_bytes: int, gpu: torch.device | None = None) -> None:
        """`gpu`: where the trainer's tensors are; the memory is registered with it, so that they come at its rate."""
        self._nonce = secrets.token_bytes(16)
        self._num_bytes = num_bytes
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, HEADER_BYTES + num_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = Mapping(self._fd, num_bytes, offset=HEADER_BYTES, writable=True)
        except (OSError, ValueError) as error:
            os.close(self._fd)
            raise TransportError(
                f"no shared memory for an arena of {num_bytes} bytes: {error}; expected that much free "
                "memory; free some, or raise the limit of the container"
            ) from error
        self._mapping.write_header(_HEADER.pack(_MAGIC, num_bytes, self._nonce))
        self._registration = None if gpu is None else Registration.of(self._mapping.tensor, gpu)

    @property
    def buffer(self) -> torch.Tensor:
        return self._mapping.tensor

    @property
    def handle(self) -> SharedMemoryHandle:
        return SharedMemoryHandle(
            owner=current_process(), fd=self._fd, num_bytes=self._num_bytes, nonce=self._nonce
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._registration is not None:
                self._registration.end()
            self._mapping.close()


class MappedMemoryFile(SharedBytes):
    """What `handle` names, mapped by another process; `TransportError` when it is not an arena."""

    _writable = False
    """Whether it is mapped to be written."""

    def __init__(self, handle: SharedMemoryHandle) -> None:
        self._owner = handle.owner
        fd = _open(handle, os.O_RDWR if self._writable else os.O_RDONLY)
        try:
            _check_file(fd, handle)
            self._link, self._inode = _link(handle), os.fstat(fd).st_ino
            self._mapping = Mapping(
                fd, handle.num_bytes, offset=HEADER_BYTES, writable=self._writable
            )
        except (OSError, ValueError) as error:
            raise _refusal(handle, f"it cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if self._mapping.header(_HEADER.size) != _HEADER.pack(
            _MAGIC, handle.num_bytes, handle.nonce
        ):
            self._mapping.close()
            raise _refusal(handle, "its header is of another arena (magic, size or nonce differ)")

    @property
    def buffer(self) -> torch.Tensor:
        return self._mapping.tensor

    @property
    def owner(self) -> ProcessRef:
        return self._owner

    def given_up(self) -> bool:
        """The trainer's descriptor is closed, or is another file by now."""
        try:
            return os.stat(self._link).st_ino != self._inode
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._mapping.close()


class WritableSharedMemoryArena(MappedMemoryFile):
    """Another process of the trainer's end: a mapping to write shards into."""

    _writable = True

    def __init__(self, handle: SharedMemoryHandle) -> None:
        super().__init__(handle)
        self.handle = handle


def _refusal(handle: SharedMemoryHandle, why: str) -> TransportError:
    return TransportError(
        f"cannot open the trainer's arena (process {handle.owner.pid}, descriptor {handle.fd}, "
        f"{handle.num_bytes} bytes): {why}; expected a sealed memory file made by "
        "weight_sync.WeightPublisher in a living process of this machine; connect again"
    )


def _link(handle: SharedMemoryHandle) -> str:
    """The trainer's descriptor, as other processes see it."""
    return f"/proc/{handle.owner.pid}/fd/{handle.fd}"


def _open(handle: SharedMemoryHandle, access: int) -> int:
    if handle.owner.host != host_id():
        raise _refusal(
            handle, "the trainer runs on another machine or in another process-id namespace"
        )
    why = why_dead(handle.owner)
    if why is not None:
        raise _refusal(handle, why)
    link = _link(handle)
    try:
        # Looked at before it is opened: opening a pipe or a terminal may block or have effects.
        target = os.readlink(link)
        if not target.startswith(f"/memfd:{_NAME}"):
            raise _refusal(handle, f"the descriptor is {target!r}")
        return os.open(link, access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except PermissionError as error:
        raise _refusal(
            handle,
            f"not permitted ({error}); run trainer and engine as the same user, and in containers that "
            "may see each other's processes",
        ) from error
    except OSError as error:
        raise _refusal(handle, f"no such descriptor ({error})") from error


def _check_file(fd: int, handle: SharedMemoryHandle) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise _refusal(handle, f"it cannot be sealed ({error})") from error
    if seals & _SEALS != _SEALS:
        raise _refusal(handle, f"it is not sealed against shrinking and growing (seals {seals:#x})")
    size = os.fstat(fd).st_size
    if size != HEADER_BYTES + handle.num_bytes:
        raise _refusal(handle, f"it has {size} bytes, expected {HEADER_BYTES + handle.num_bytes}")
