"""How the ranks of one engine agree on an update: all of them write the same version, or none keeps it.

Each rank holds a part of every tensor. Fingerprints are sums over positions (a multilinear hash), so the parts' values
add up to the value of the whole; parts that several ranks hold must be equal, and count once.
"""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import numpy as np

from ..errors import DeadlineExceeded, WeightUpdateError

T = TypeVar("T")


class RankAgreement(Protocol):
    """Collectives among the ranks of an engine. All ranks make the same calls in the same order, from one thread each.

    Every call has a deadline. One that fails leaves the ranks unable to agree: it and all later ones raise
    `EngineDiedError`, and the engine ends. So whatever can fail on one rank alone is settled before the next call.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Every rank's uint64 array of one shape, stacked in rank order, on every rank."""

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank."""


class SoloAgreement:
    """The agreement of one rank with itself."""

    rank = 0
    size = 1

    def gather(self, values: np.ndarray) -> np.ndarray:
        """`values`, as the only row."""
        return values[None]

    def gather_text(self, text: str) -> list[str]:
        """`text` alone."""
        return [text]


def together(agreement: RankAgreement, step: Callable[[], T]) -> T:
    """Do `step` on all ranks; when it fails on one, it has failed on all.

    The rank that failed raises its own error; the others a `WeightUpdateError` that names it.
    """
    result, failure = _outcome(step)
    if agreement.size > 1:
        _gather_unless_failed(agreement, np.zeros(0, dtype=np.uint64), failure)
    if failure is not None:
        raise failure
    return cast(T, result)


def _outcome(step: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return step(), None
    except BaseException as error:
        return None, error


def _gather_unless_failed(
    agreement: RankAgreement, values: np.ndarray, failure: BaseException | None
) -> np.ndarray:
    """`gather`, and in the same message whether a rank has failed; then all tell why, and all raise."""
    rows = agreement.gather(np.append(values.reshape(-1), np.uint64(failure is not None)))
    if not rows[:, -1].any():
        return rows[:, :-1].reshape(agreement.size, *values.shape)
    words = "" if failure is None else f"{type(failure).__name__}: {failure}"
    problems = agreement.gather_text(words)
    if failure is not None:
        raise failure
    told = "; ".join(
        f"rank {rank}: {text or 'it gave no reason'}"
        for rank, text in enumerate(problems)
        if rows[rank, -1]
    )
    raise WeightUpdateError(f"the update failed on another rank: {told}")


def check_in_time(
    agreement: RankAgreement, end: float, what: str, *, have_met: bool = False
) -> None:
    """`DeadlineExceeded` on all ranks when `end` (monotonic, each rank's own) has passed on one of them.

    The last thing before what cannot be taken back: since the loop decided to come here a process may have been
    stopped for any length of time, and whoever asked has been told that it was too late. So may a rank before it was
    told at all, which then counts its time anew: the clock is looked at when all have come. `have_met`: a gathering at
    this boundary has just said so.
    """
    if agreement.size > 1 and not have_met:
        agreement.gather(np.zeros(1, dtype=np.uint64))
    late = time.monotonic() >= end
    if agreement.size > 1:
        late = bool(agreement.gather(np.array([late], dtype=np.uint64)).any())
    if late:
        raise DeadlineExceeded(
            f"{what}: its deadline passed before it had begun, and it was not carried out; nothing has changed; raise "
            "timeout_s, or look at what keeps the engine"
        )


def whole_values(
    agreement: RankAgreement, read: Callable[[], np.ndarray], regions: np.ndarray
) -> np.ndarray:
    """Fingerprints of whole tensors (N,) uint64 from every rank's values of its own parts.

    `read` has this rank's; where it fails on one rank, this has failed on all.

    read() (N,) uint64: this rank's sums; regions (N,) uint64: which part of each tensor it holds, equal for equal ones.
    Where ranks that hold the same part disagree about it, the result is wrong on purpose, and so compares unequal.
    """
    values, failure = _outcome(read)
    if agreement.size > 1:
        mine = np.stack([np.zeros_like(regions) if values is None else values, regions])
        gathered = _gather_unless_failed(agreement, mine, failure)
    if failure is not None:
        raise failure
    values = cast(np.ndarray, values)
    if agreement.size == 1:
        return values
    found, parts = gathered[:, 0], gathered[:, 1]
    total = np.zeros_like(values)
    torn = np.zeros(len(values), dtype=bool)
    for rank in range(agreement.size):
        counts = np.ones(len(values), dtype=bool)
        for lower in range(rank):
            same = parts[rank] == parts[lower]
            torn |= same & (found[rank] != found[lower])
            counts &= ~same
        total += np.where(counts, found[rank], np.uint64(0))
    total[torn] ^= np.uint64(1)
    return total
