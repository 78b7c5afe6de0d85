"""Fingerprints of the bytes that are resident now, read when they are asked for and known when nothing has changed."""

from __future__ import annotations

import numpy as np

from ..errors import FingerprintMismatch, WeightUpdateError
from ..layout.tensor_sums import name_key
from ..plan.plan_cache import KnownPlan, PlanCache
from ..staging.stage import as_uint64
from .agreement import RankAgreement, whole_values
from .host import WeightHost


class ResidentFingerprints:
    """One 64-bit value for each tensor of the model, in manifest order. For the receiver's thread alone."""

    def __init__(
        self, names: list[str], plans: PlanCache, host: WeightHost, agreement: RankAgreement
    ) -> None:
        self._name_keys = np.array([name_key(name) for name in names], dtype=np.uint64)
        self._plans = plans
        self._host = host
        self._agreement = agreement
        self._known: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """Read all resident bytes; all ranks ask at the same time. `WeightUpdateError` while they are released."""
        known = self._plans.canonical

        def read() -> np.ndarray:
            with self._host.reading():
                gone = self._host.unwritable()
                if gone is not None:  # one rank may be ahead of another with a release
                    raise WeightUpdateError(f"the parameters cannot be read: {gone}")
                return as_uint64(known.plan.resident_fingerprints())

        return whole_values(self._agreement, read, known.regions)

    def forget(self) -> None:
        """The bytes have changed in a way that nobody declared."""
        self._known = None

    def check_restored(self) -> None:
        """`FingerprintMismatch` unless the bytes are again those that were known."""
        if self._known is not None and not np.array_equal(self.read(), self._known):
            raise FingerprintMismatch("the restored bytes are not those of the previous version")

    def after(
        self, plan: KnownPlan, declared: np.ndarray, present: np.ndarray, covered: np.ndarray
    ) -> np.ndarray:
        """The values after a verified commit: what the trainer declared, read where that does not say it all."""
        values = self._known
        if values is None:
            values = np.zeros(len(covered), dtype=np.uint64)
        exact = plan.to_canonical(declared, values, present)
        if not exact or (self._known is None and not covered.all()):
            values = self.read()
        self._known = values
        return values

    def combined(self, values: np.ndarray, which: np.ndarray | None = None) -> int:
        """The fingerprint of the model, as `weight_sync.combine` makes it; of the tensors `which` (a mask) alone."""
        keys = self._name_keys if which is None else self._name_keys[which]
        return int((keys * values).sum(dtype=np.uint64))  # modulo 2^64
