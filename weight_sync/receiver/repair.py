"""How weights that are not whole become whole again: by one complete update, or by several that cover everything.

Trainers that send a model bucket by bucket, each a transaction of its own, repair an engine too, as long as all of them
carry the same label; another label, or none, starts over, because parts of two versions do not make one. Only an
engine that was started without weights takes parts without a label for those of one version.
"""

import numpy as np


class Repair:
    """Counts what has been written since the weights were lost."""

    def __init__(self, reason: str, num_tensors: int, *, from_nothing: bool = False) -> None:
        self.reason = reason
        """Why the weights are not whole."""
        self._from_nothing = from_nothing
        self._written = np.zeros(num_tensors, dtype=bool)
        self._label: str | None = None

    def after(self, covered: np.ndarray, label: str | None) -> "Repair | None":
        """What is left to repair when the tensors `covered` (mask) are written under `label`; None: all is whole."""
        left = Repair(self.reason, len(covered), from_nothing=self._from_nothing)
        left._label = label
        goes_on = label == self._label and (label is not None or self._from_nothing)
        left._written = covered | self._written if goes_on else covered.copy()
        return None if left._written.all() else left

    def __str__(self) -> str:
        num = int(self._written.sum())
        return f"{self.reason}; {num} of {len(self._written)} tensors were pushed since, under one label"
