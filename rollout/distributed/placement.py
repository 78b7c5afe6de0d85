"""Where processes are and what they need, and which nodes they should go to: what one decides before asking Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlace:
    """Where a process is, as it sees itself."""

    node_id: str
    """Ray's name of the node."""
    ip: str
    """Address by which other nodes reach it."""
    machine: str
    """Equal for processes that can share memory files; empty where the system does not tell."""
    gpu_ids: tuple[str, ...]
    """GPUs that Ray gave it, by the machine's numbers."""
    pid: int
    """Its process id there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node of the cluster."""

    node_id: str
    """Ray's name of it."""
    resources: Mapping[str, float]
    """All that it has, in use or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What processes that belong together need."""

    num_processes: int
    """How many; all on one node."""
    num_cpus: float
    """CPUs of each."""
    num_gpus: float
    """GPUs of each; may be a fraction."""
    node_id: str | None = None
    """The node they must be on; None: any."""
    group_name: str | None = None
    """A placement group of the caller's to live in; None: one of their own."""
    first_bundle: int = 0
    """Its bundle for the first process; the others follow."""

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one process, without those it does not need."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    @property
    def total(self) -> dict[str, float]:
        """Resources of all of them."""
        return {name: amount * self.num_processes for name, amount in self.bundle.items()}


def spread_over(
    nodes: Sequence[Node], used: Sequence[str], wanted: Mapping[str, float]
) -> list[str]:
    """Node ids that are large enough for `wanted`, those that hold the fewest of `used` first.

    `used` has a node id for each engine that is placed already. A function of its arguments alone.
    """
    fitting = [
        node
        for node in nodes
        if all(node.resources.get(name, 0.0) >= amount for name, amount in wanted.items())
    ]
    return [node.node_id for node in sorted(fitting, key=lambda node: used.count(node.node_id))]
