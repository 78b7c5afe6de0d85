"""All that this package knows of Ray: where processes are placed, and calls to them with deadlines.

The only module that imports Ray, and only when it is used. What an actor *does* is an ordinary class of another module;
here it is started on a node, called, watched, and ended. Ray carries small messages alone (text, numbers, bytes of
JSON): tokens and weights go over our own sockets and memory files.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from weight_sync.errors import DeadlineExceeded, EngineDiedError
from weight_sync.wire.process import host_id

from ..errors import ConfigError, RolloutError
from .placement import Node, ProcessPlace, Reservation

NODE_LABEL = "ray.io/node-id"


class NoRoomError(ConfigError):
    """The cluster has not, or not now, what was asked for."""


def ray_module() -> Any:
    """The module `ray`, or an error that says how to get it."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"Ray is not installed ({error}); expected ray >= 2.51 for executor='ray', RolloutActor and Ray pools; "
            "pip install 'rollout-sync[ray]'"
        ) from None
    return ray


def connected_ray() -> Any:
    """The module `ray` in a process that belongs to a cluster; starts or joins one where it does not.

    A caller who wants another cluster than the default one calls `ray.init` first.
    """
    ray = ray_module()
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init()
    return ray


def runtime_environment() -> dict[str, Any] | None:
    """What workers need in order to import this package: nothing where it is installed, else the driver's path to it.

    The path must lead there on the workers' nodes as well.
    """
    name = __name__.partition(".")[0]
    installed = [
        entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")
    ]
    if PathFinder.find_spec(name, installed) is not None:
        return None
    others = [finder for finder in sys.meta_path if finder is not PathFinder]
    if any(finder.find_spec(name, None) is not None for finder in others):
        return None  # An editable installation.
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}}


def this_place() -> ProcessPlace:
    """Of a process that Ray started."""
    ray = ray_module()
    context = ray.get_runtime_context()
    return ProcessPlace(
        node_id=context.get_node_id(),
        ip=ray.util.get_node_ip_address(),
        machine=host_id(),
        gpu_ids=tuple(context.get_accelerator_ids().get("GPU", ())),
        pid=os.getpid(),
    )


def was_restarted() -> bool:
    """Whether Ray has made the actor of this process anew, after an earlier one of it died."""
    return bool(ray_module().get_runtime_context().was_current_actor_reconstructed)


def this_address() -> str:
    """The address by which other nodes reach this process."""
    address: str = connected_ray().util.get_node_ip_address()
    return address


def living_nodes() -> list[Node]:
    """The cluster's nodes, in the order of their names."""
    nodes = [
        Node(node_id=node["NodeID"], resources=node["Resources"])
        for node in connected_ray().nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: node.node_id)


def on_one_machine() -> bool:
    """Whether all nodes have one address, so that loopback reaches every process."""
    addresses = {node["NodeManagerAddress"] for node in connected_ray().nodes() if node["Alive"]}
    return len(addresses) <= 1


class ReservedRoom:
    """Reserved room on one node; give it back with `release`."""

    def __init__(self, wanted: Reservation, timeout_s: float) -> None:
        """Reserve, or raise `NoRoomError` saying what is missing when there is no room within `timeout_s`."""
        self.wanted = wanted
        self._ray = connected_ray()
        self._owned = wanted.group_name is None
        if wanted.group_name is not None:
            self._group = self._callers_group(wanted.group_name)
            return
        selector = {NODE_LABEL: wanted.node_id} if wanted.node_id is not None else None
        bundles = [wanted.bundle or {"CPU": 0.001} for _ in range(wanted.num_processes)]
        self._group = self._ray.util.placement_group(
            bundles,
            strategy="STRICT_PACK",
            bundle_label_selector=[selector] * len(bundles) if selector else None,
        )
        if not self._group.wait(math.ceil(timeout_s)):  # Ray counts whole seconds.
            self.release()
            raise NoRoomError(
                f"no room for {wanted.num_processes} processes with {wanted.bundle} each on one node within "
                f"{timeout_s:.3g} s; the nodes have {_sizes()}, free in the whole cluster are {_free(self._ray)}; "
                "start Ray with more, ask for less (ray_num_cpus, ray_num_gpus), or end what holds it"
            )

    def start(self, cls: type, index: int, *args: Any) -> Actor:
        """Make `cls(*args)` an actor in the room of process number `index`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group,
            placement_group_bundle_index=self.wanted.first_bundle + index,
        )
        remote = self._ray.remote(cls).options(
            num_cpus=self.wanted.num_cpus,
            num_gpus=self.wanted.num_gpus,
            scheduling_strategy=strategy,
            max_restarts=0,
            max_concurrency=4,
            runtime_env=runtime_environment(),
        )
        return Actor(self._ray, remote.remote(*args))

    def release(self) -> None:
        """Give the room back, and end what is still in it; a caller's group is left alone. Safe to repeat."""
        if self._owned and self._ray.is_initialized():
            self._owned = False
            self._ray.util.remove_placement_group(self._group)

    def _callers_group(self, name: str) -> Any:
        wanted = self.wanted
        try:
            group = self._ray.util.get_placement_group(name)
        except ValueError:
            raise ConfigError(
                f"ray_placement_group: got {name!r}, expected the name of a placement group in namespace "
                f"{self._ray.get_runtime_context().namespace!r}; give yours a name when you make it"
            ) from None
        bundles = group.bundle_specs
        chosen = bundles[wanted.first_bundle : wanted.first_bundle + wanted.num_processes]
        fits = all(
            bundle.get(name, 0.0) >= amount
            for bundle in chosen
            for name, amount in wanted.bundle.items()
        )
        if len(chosen) < wanted.num_processes or not fits:
            raise ConfigError(
                f"ray_placement_group {name!r}: got bundles {bundles}, expected {wanted.num_processes} with at least "
                f"{wanted.bundle}, from number {wanted.first_bundle} on; make it larger, or set ray_first_bundle"
            )
        return group


class Actor:
    """A process that Ray started for us. Any thread may call."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray = ray
        self._handle = handle

    def submit(self, method: str, *args: Any) -> ActorCall:
        """Call a method and return at once."""
        return ActorCall(self._ray, getattr(self._handle, method).remote(*args), method)

    def call(self, method: str, *args: Any, timeout_s: float, whole_s: float | None = None) -> Any:
        """Call a method and wait for its result, as `ActorCall.result`."""
        return self.submit(method, *args).result(timeout_s, whole_s)

    def kill(self) -> None:
        """End the process now; fine when it is gone."""
        if self._ray.is_initialized():
            self._ray.kill(self._handle)


def start_actor(cls: type, options: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Ray's own handle of a new actor of `cls`, with Ray's own options; for callers who use Ray themselves."""
    remote = connected_ray().remote(cls)
    return remote.options(**{"runtime_env": runtime_environment(), **options}).remote(
        *args, **kwargs
    )


class ActorCall:
    """A call of an actor's method that is under way."""

    def __init__(self, ray: Any, reference: Any, what: str) -> None:
        self._ray = ray
        self._reference = reference
        self._what = what

    def result(self, timeout_s: float, whole_s: float | None = None) -> Any:
        """What it returned or raised; `DeadlineExceeded` when it takes longer, `EngineDiedError` when it died.

        whole_s: the limit that a caller knows, where `timeout_s` is what is left of it.
        """
        try:
            return self._ray.get(self._reference, timeout=timeout_s)
        except self._ray.exceptions.GetTimeoutError:
            raise DeadlineExceeded(
                f"{self._what}: the actor did not answer within {whole_s or timeout_s:.3g} s; it waits for "
                "resources, starts slowly, or hangs; raise the timeout (start_timeout_s of a start), or look at "
                "`ray status` and the actor's log"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise translated(error) from error

    @property
    def future(self) -> Future[Any]:
        """Done when the call has ended, however it did; its errors are Ray's own."""
        future: Future[Any] = self._reference.future()
        return future


def translated(error: BaseException) -> Exception:
    """One of our errors for one of Ray's: `EngineDiedError` for a dead actor, else what the method raised."""
    exceptions = ray_module().exceptions
    if isinstance(error, exceptions.RayActorError):
        return EngineDiedError(f"the actor is dead: {_first_words(error)}")
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return cause
    return RolloutError(f"Ray failed: {type(error).__name__}: {_first_words(error)}")


def has_gpus() -> bool:
    """Whether any node of the cluster offers GPUs."""
    return any(node.resources.get("GPU", 0.0) > 0 for node in living_nodes())


def _first_words(error: BaseException) -> str:
    """Ray's messages are pages long: the line that says why, or the first and the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("The actor is dead because")]
    ends = " ... ".join(dict.fromkeys((lines[0][:200], lines[-1][:200]))) if lines else ""
    return told[0][:400] if told else ends or type(error).__name__


def _sizes() -> str:
    return "; ".join(
        str({name: node.resources.get(name, 0.0) for name in ("CPU", "GPU")})
        for node in living_nodes()
    )


def _free(ray: Any) -> dict[str, float]:
    free = ray.available_resources()
    return {name: free.get(name, 0.0) for name in ("CPU", "GPU")}
