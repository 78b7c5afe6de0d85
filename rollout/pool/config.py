"""What a pool takes besides the options of its engines."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Options of `rollout.RolloutPool` that no single engine has."""

    num_replicas: int = 2
    """Engines to start with, and to keep alive."""
    max_inflight_samples: int | None = None
    """Samples that one replica is given at once, more wait in the pool; None: 1.25 x `max_running_requests`."""
    affinity_blocks: int = 4
    """Leading KV blocks of a prompt that decide which replica it prefers; 0: prompts prefer none."""
    affinity_slack: int = 8
    """Samples by which the preferred replica may be busier than the least busy one and still be taken."""
    replace_dead: bool = True
    """Start a new replica for one that died; False: the pool shrinks."""
    max_reruns: int = 3
    """How often a prompt is run again because its replica died, before its caller gets the error."""
    max_start_failures: int = 3
    """Starts of a replacement that may fail in a row before the pool goes on without it."""
    health_interval_s: float = 2.0
    """Seconds between two questions to a replica that it must answer."""
    health_timeout_s: float = 30.0
    """Seconds that an answer may take (a step, or a commit) before the replica counts as hung and is ended."""

    def check(self) -> None:
        """Ranges that a type cannot express; `ConfigError` for the first that is broken."""
        for name in ("num_replicas", "max_inflight_samples", "max_start_failures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        for name in ("affinity_blocks", "affinity_slack", "max_reruns"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name}: got {value}, expected at least 0")
        for name in ("health_interval_s", "health_timeout_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name}: got {value}, expected more than 0 seconds")


POOL_OPTIONS = frozenset(field.name for field in fields(PoolConfig))
