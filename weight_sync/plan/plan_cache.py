"""The plans of a receiver, by the digest of their manifest, and which canonical tensors each of them covers."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import ManifestMismatch, ProtocolError
from ..layout.encoding import FULL, Encoding
from ..layout.manifest import Manifest, WireManifest, mismatch
from ..layout.tensor_sums import name_key
from ..layout.weight_map import WeightMap
from .plan import Plan, compile_plan

_KEPT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPlan:
    """A compiled manifest. Row i says: manifest tensor `owners[i]` holds canonical tensor `targets[i]`."""

    plan: Plan
    """What writes it."""
    owners: np.ndarray
    """Positions in the manifest; a fused tensor occurs once per component."""
    targets: np.ndarray
    """Positions in the canonical manifest."""
    num_canonical: int
    """Tensors of the canonical manifest."""
    regions: np.ndarray
    """For each tensor of the manifest, which part of it this rank holds: uint64, equal for equal parts."""

    @property
    def manifest(self) -> Manifest:
        """The arena's layout."""
        return self.plan.manifest

    def covered(self, present: np.ndarray) -> np.ndarray:
        """Which canonical tensors the manifest tensors `present` hold; both are masks."""
        mask = np.zeros(self.num_canonical, dtype=bool)
        mask[self.targets[present[self.owners]]] = True
        return mask

    def to_canonical(self, declared: np.ndarray, resident: np.ndarray, present: np.ndarray) -> bool:
        """Put the fingerprints `declared` where they belong in `resident`; False where components are fused, whose own
        values nobody declared."""
        rows = present[self.owners]
        resident[self.targets[rows]] = declared[self.owners[rows]]
        return len(np.unique(self.owners[rows])) == int(rows.sum())


class PlanCache:
    """Compiles each manifest once; keeps the canonical plan and the last few others."""

    def __init__(
        self, canonical: Manifest, weight_map: WeightMap, encodings: Iterable[Encoding] = (FULL,)
    ) -> None:
        self._canonical = canonical
        self._weight_map = weight_map
        self._encodings = {encoding.name: encoding for encoding in encodings}
        self._plans: OrderedDict[tuple[str, str], KnownPlan] = OrderedDict()
        self.canonical = self._compile(canonical, FULL)

    def knows(self, digest: str, encoding: str = FULL.name) -> bool:
        """Whether that manifest is compiled."""
        return self._is_canonical(digest, encoding) or (digest, encoding) in self._plans

    def find(
        self, digest: str, wire: WireManifest | None, encoding: str = FULL.name
    ) -> KnownPlan | None:
        """The plan of the manifest with that digest; None when it is neither known nor given."""
        if self._is_canonical(digest, encoding):
            return self.canonical
        how = self._encodings.get(encoding)
        if how is None:
            raise ProtocolError(
                f"an encoding that this engine does not know: got {encoding!r}, expected one of "
                f"{', '.join(self._encodings)}; both sides must run the same release"
            )
        key = digest, encoding
        known = self._plans.get(key)
        if known is not None:
            self._plans.move_to_end(key)
            return known
        if wire is None:
            return None
        manifest = Manifest.from_wire(wire)
        if manifest.digest != digest:
            raise ManifestMismatch(
                f"the manifest is not the one that was announced: got digest {manifest.digest}, expected "
                f"{digest}; both sides must run the same release"
            )
        known = self._plans[key] = self._compile(manifest, how)
        if len(self._plans) > _KEPT:
            self._plans.popitem(last=False)
        return known

    def not_covered(self, known: KnownPlan, present: np.ndarray) -> ManifestMismatch | None:
        """The error of an update that must be complete and is not."""
        tensors = self._canonical.tensors
        missing = np.flatnonzero(~known.covered(present))
        if not len(missing):
            return None
        return mismatch(
            f"the update covers {len(tensors) - len(missing)} of {len(tensors)} tensors",
            [f"{tensors[i]}: missing" for i in missing],
            "send all of them, or allow a partial update with strict=False",
        )

    def _is_canonical(self, digest: str, encoding: str) -> bool:
        return encoding == FULL.name and digest == self._canonical.digest

    def _compile(self, manifest: Manifest, encoding: Encoding) -> KnownPlan:
        plan = compile_plan(manifest, self._weight_map, encoding)
        rows = [
            (i, self._canonical.index[name])
            for i, meta in enumerate(manifest.tensors)
            for name in self._weight_map.locate(meta.name).canonical
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 2)
        return KnownPlan(
            plan=plan,
            owners=table[:, 0],
            targets=table[:, 1],
            num_canonical=len(self._canonical.tensors),
            regions=np.array(
                [self._region_key(meta.name) for meta in manifest.tensors], dtype=np.uint64
            ),
        )

    def _region_key(self, name: str) -> int:
        regions = sorted(
            str(placement.region) for placement in self._weight_map.locate(name).placements
        )
        return name_key(";".join(regions)) if regions else 0
