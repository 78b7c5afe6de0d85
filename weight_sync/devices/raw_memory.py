"""Tensors over memory that torch did not allocate."""

from __future__ import annotations

import ctypes

import torch
from torch.utils import dlpack

_DEVICES = {"cpu": 1, "cuda": 2}
_UNSIGNED = 1


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("num_dims", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("length", ctypes.c_int64),  # behind the structure as others know it: the shape points here
    )


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """The bytes at `address` as a uint8 tensor on `device`, which reads them in its own address space.

    It owns nothing: whoever owns the memory keeps it until no tensor over it is used any more. The memory itself may be
    another GPU's, which `device` reads over their link; torch takes it for its own.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    # Memory of libc, with libc's own `free` to end it: it may outlive every Python object.
    place = libc.malloc(ctypes.sizeof(_Managed))
    managed = _Managed.from_address(place)
    managed.tensor = _Tensor(
        data=address,
        device=_Device(_DEVICES[device.type], device.index or 0),
        num_dims=1,
        dtype=_DataType(_UNSIGNED, 8, 1),
        shape=place + _Managed.length.offset,
        strides=None,
        byte_offset=0,
    )
    managed.context = None
    managed.deleter = ctypes.cast(libc.free, ctypes.c_void_p)
    managed.length = num_bytes
    new_capsule = ctypes.PYFUNCTYPE(
        ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    )(("PyCapsule_New", ctypes.pythonapi))
    tensor: torch.Tensor = dlpack.from_dlpack(new_capsule(place, b"dltensor", None))
    return tensor
