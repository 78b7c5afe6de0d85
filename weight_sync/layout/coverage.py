"""Whether views tile tensors: every element of every parameter covered exactly once."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from .memory import Storage, byte_range, storage_key


def coverage_problems(
    parameters: Mapping[str, torch.Tensor], views: Iterable[tuple[str, torch.Tensor]]
) -> list[str]:
    """One line per parameter that `views` (name of what is stored, memory) do not tile, and per stray view."""
    owners: defaultdict[Storage, list[tuple[int, int, str]]] = defaultdict(list)
    for name, parameter in parameters.items():
        if parameter.numel():
            owners[storage_key(parameter)].append((*byte_range(parameter), name))
    problems = list(_shared(owners))
    held: defaultdict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, view in views:
        if not view.numel():
            continue
        start, end = byte_range(view)
        ranges = owners.get(storage_key(view), [])
        at = bisect_right(ranges, start, key=lambda owner: owner[0]) - 1
        if at < 0 or end > ranges[at][1]:
            problems.append(
                f"{name}: got a destination outside of the parameters, expected a view of one"
            )
        else:
            held[ranges[at][2]].append((name, view))
    for name, parameter in parameters.items():
        if parameter.numel():
            problems += _tiling_problems(name, parameter, held[name])
    return problems


def _shared(owners: Mapping[Storage, list[tuple[int, int, str]]]) -> Iterator[str]:
    for ranges in owners.values():
        ranges.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(ranges):
            if start < end:
                yield (
                    f"{other}: got a parameter in the memory of {name}, expected memory of its own; "
                    "pass tied parameters once, under one name, and the other name as an alias"
                )


def _tiling_problems(
    name: str, parameter: torch.Tensor, views: Sequence[tuple[str, torch.Tensor]]
) -> Iterator[str]:
    for stored, view in views:
        if view.dtype != parameter.dtype:
            yield f"{stored}: got a destination of {view.dtype} in {name}, expected {parameter.dtype}"
            return
    if parameter.is_contiguous() and all(view.is_contiguous() for _, view in views):
        yield from _interval_problems(name, parameter, views)
    else:
        yield from _counted_problems(name, parameter, views)


def _interval_problems(
    name: str, parameter: torch.Tensor, views: Sequence[tuple[str, torch.Tensor]]
) -> Iterator[str]:
    size = parameter.element_size()
    covered, end = byte_range(parameter)
    for start, stop, stored in sorted((*byte_range(view), stored) for stored, view in views):
        if start > covered:
            yield _uncovered(name, (start - covered) // size, parameter.numel(), f"before {stored}")
        elif start < covered:
            yield f"{name}: got {(covered - start) // size} elements of {stored} over another tensor's"
        covered = max(covered, stop)
    if covered < end:
        yield _uncovered(name, (end - covered) // size, parameter.numel(), "at the end")


def _counted_problems(
    name: str, parameter: torch.Tensor, views: Sequence[tuple[str, torch.Tensor]]
) -> Iterator[str]:
    # A byte per element of one parameter at a time, and only where a destination is strided.
    start, end = byte_range(parameter)
    size = parameter.element_size()
    counts = torch.zeros((end - start) // size, dtype=torch.uint8)
    for _, view in views:
        counts.as_strided(view.shape, view.stride(), view.storage_offset() - start // size).add_(1)
    own = counts.as_strided(parameter.shape, parameter.stride())
    uncovered = int((own == 0).sum())
    total = sum(view.numel() for _, view in views)
    if uncovered:
        yield _uncovered(
            name, uncovered, parameter.numel(), f"by {[stored for stored, _ in views]}"
        )
    elif total != parameter.numel():
        yield f"{name}: got {total} elements placed in it, expected {parameter.numel()}, each once"


def _uncovered(name: str, missing: int, total: int, where: str) -> str:
    return f"{name}: got no tensor for {missing} of its {total} elements ({where})"
