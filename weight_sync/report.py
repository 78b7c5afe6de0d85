"""What an update did: the answer of every update call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_LISTED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One committed update. Unpacks as `(True, message)`: a failed update raises instead.

    Durations are seconds on the trainer's clock, unless a field says otherwise.
    """

    version: int
    """The weight version that the engine serves since."""
    label: str | None
    """The caller's own name of that version; None: it gave none."""
    num_tensors: int
    """Tensors that were written."""
    num_bytes: int
    """Their bytes, without padding."""
    updated: int
    """Tensors of the engine that this update replaced; an alias counts as the tensor that it names."""
    left: tuple[str, ...] = ()
    """Tensors of the engine that were not sent and keep their old values; empty after a complete update."""
    casts: tuple[tuple[str, str, str], ...] = ()
    """Tensors that were converted while packing: name, the trainer's dtype, the engine's."""
    fingerprint: int = 0
    """Fingerprint of the engine's whole model after the update."""
    transport: str = "local"
    """How the bytes went: "local", "shared_memory", "disk"."""
    pack_s: float = 0.0
    """Copying the trainer's tensors into the arena, and fingerprinting them there; on a GPU, from the first one on."""
    stage_s: float = 0.0
    """From the first staged bucket to the vote, generation going on meanwhile."""
    copy_s: float = 0.0
    """Writing the resident parameters; the engine's clock."""
    verify_s: float = 0.0
    """Fingerprinting the resident parameters; the engine's clock."""
    pause_s: float = 0.0
    """From the end of the last step on the old version to the start of the next; the engine's clock."""
    begin_to_committed_s: float = 0.0
    """From `Begin` until the bytes were written."""
    begin_to_verified_s: float = 0.0
    """From `Begin` until the resident bytes were found right."""
    message: str = ""
    """One line for people; made from the fields when it is left empty."""

    def __post_init__(self) -> None:
        if not self.message:
            object.__setattr__(self, "message", self._describe())

    def __iter__(self) -> Iterator[bool | str]:
        """`success, message = report`."""
        return iter((True, self.message))

    def __len__(self) -> int:
        return 2

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"SyncReport({self.message})"

    @property
    def complete(self) -> bool:
        """Whether every tensor of the engine was replaced."""
        return not self.left

    def _describe(self) -> str:
        label = f" ({self.label!r})" if self.label is not None else ""
        text = [
            f"version {self.version}{label}: {self.num_tensors} tensors, "
            f"{_size(self.num_bytes)} by {self.transport}",
            f"committed in {_time(self.begin_to_committed_s)} (pause {_time(self.pause_s)})",
        ]
        if self.casts:
            kinds = sorted({f"{source} to {to}" for _, source, to in self.casts})
            text.append(f"{len(self.casts)} cast ({', '.join(kinds)})")
        if self.left:
            names = ", ".join(self.left[:_LISTED]) + (", ..." if len(self.left) > _LISTED else "")
            text.append(f"{len(self.left)} left as they were: {names}")
        return "; ".join(text)


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
