"""What a trainer may hand over as named tensors: modules, wrapped or not, mappings, pairs, iterators of both kinds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterable, Generator, ItemsView, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn

from ..layout.named_tensors import NamedTensors, named_weights, pairs_of

T = TypeVar("T")
AnyNamedTensors = NamedTensors | AsyncIterable[tuple[str, torch.Tensor]]

_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
)
"""What `DistributedDataParallel`, `torch.compile`, activation checkpointing and others put into parameters' names."""


def unwrapped(name: str) -> str:
    """`name` without what wrappers have put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


Listed = list[tuple[str, torch.Tensor]] | ItemsView[str, torch.Tensor]
"""Named tensors that all exist at once. The items of a dict are left where they are: 20,000 pairs more are as many
objects for Python's garbage collection to look at, in the middle of an update."""
_DICT_ITEMS = type(dict[str, torch.Tensor]().items())


def is_listed(source: object) -> TypeGuard[Listed]:
    """Whether it is a list, or the items of a dict: those of other mappings may come to be as they are asked for."""
    return isinstance(source, list | _DICT_ITEMS)


@contextmanager
def tensors_of(source: NamedTensors) -> Iterator[Iterable[tuple[str, torch.Tensor]]]:
    """What `source` names: `Listed` where all tensors exist at once, else an iterator.

    Where a module has adapters, they are merged one layer at a time; a layer is what it was, to the bit, when it was
    passed or the block has ended.
    """
    if isinstance(source, nn.Module) and any(_is_adapter(part) for part in source.modules()):
        merged = _merged(source)
        try:
            yield merged
        finally:
            merged.close()  # a traceback may hold it for long
    elif isinstance(source, dict) and type(source) in (dict, OrderedDict):
        yield source.items()
    else:
        yield pairs_of(source)


def _is_adapter(part: nn.Module) -> bool:
    """A layer of an adapter library (PEFT): around a base layer, into which it can be merged."""
    # Asked of every module at every update: a look into a dict, where `hasattr` of a module would raise and catch.
    return "base_layer" in part._modules and callable(getattr(part, "merge", None))


def _merged(module: nn.Module) -> Generator[tuple[str, torch.Tensor], None, None]:
    adapters = {name: part for name, part in module.named_modules() if _is_adapter(part)}
    for name, adapter in adapters.items():
        yield from _merged_layer(_plain(name), adapter)
    inside = tuple(f"{name}." for name in adapters)
    for name, parameter in named_weights(module):
        if not name.startswith(inside) and ".original_module." not in f".{name}":
            yield _plain(name), parameter


def _merged_layer(name: str, adapter: nn.Module) -> Generator[tuple[str, torch.Tensor], None, None]:
    layer: Any = adapter
    base: nn.Module = layer.base_layer
    kept = [(held, held.detach().clone()) for held in base.parameters()]
    before = bool(getattr(layer, "merged", False))
    try:
        if not before:
            layer.merge()
        for own, parameter in base.named_parameters():
            yield f"{name}.{own}", parameter
    finally:
        if not before:
            if getattr(layer, "merged", True):
                layer.unmerge()
            with torch.no_grad():  # adding and subtracting does not give back the same bits
                for held, value in kept:
                    held.copy_(value)


def _plain(name: str) -> str:
    """`name` as it was before the adapters came."""
    name = unwrapped(name).removeprefix("base_model.model.")
    head, found, tail = name.partition(".modules_to_save.")
    return f"{head}.{tail.partition('.')[2]}" if found else name


def blocking(source: AnyNamedTensors) -> NamedTensors:
    """`source` for a call on another thread: an asynchronous iterator goes on in the loop that runs now."""
    if not isinstance(source, AsyncIterable):
        return source
    return _blocking(source, asyncio.get_running_loop())


def _blocking(source: AsyncIterable[T], loop: asyncio.AbstractEventLoop) -> Iterator[T]:
    items = aiter(source)

    async def following() -> tuple[T] | None:
        try:
            return (await anext(items),)
        except StopAsyncIteration:
            return None

    while (item := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not None:
        yield item[0]
