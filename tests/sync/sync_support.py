"""A toy engine for tests of the sync: a model with every kind of tensor, and a loop that would notice a mixture.

The model is filled with one value per version, so that a step which reads two different values has seen a torn model.
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from weight_sync.devices.mapped_memory import MappedMemory, MapsMemory
from weight_sync.errors import ERRORS, DeadlineExceeded, WeightUpdateError
from weight_sync.layout.encoding import FULL, Encoding
from weight_sync.layout.manifest import align
from weight_sync.layout.weight_map import Placement, WeightMap
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.wire.channel import RpcChannel
from weight_sync.wire.messages import WeightReply, WeightRequest
from weight_sync.wire.rpc import RpcClient, RpcServer

FOLDER = Path(__file__).parent
ALIAS = "lm_head.weight"
FUSED = "layers.0.qkv.weight"


def toy_shapes() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Canonical names of the toy model: mixed dtypes, a scalar, an empty tensor, sizes that fill no word."""
    return {
        "embed.weight": ((24, 16), torch.bfloat16),
        "layers.0.q.weight": ((16, 16), torch.bfloat16),
        "layers.0.k.weight": ((8, 16), torch.bfloat16),
        "layers.0.v.weight": ((8, 16), torch.bfloat16),
        "layers.0.norm.weight": ((13,), torch.float32),
        "layers.0.scale": ((), torch.float32),
        "layers.0.nothing": ((0, 4), torch.bfloat16),
        "layers.1.strided.weight": ((6, 10), torch.bfloat16),
        "norm.weight": ((7,), torch.bfloat16),
    }


def weights(
    value: float, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """A trainer's tensors, every element `value`."""
    return {
        name: torch.full(shape, value, dtype=own if dtype is None else dtype, device=device)
        for name, (shape, own) in toy_shapes().items()
    }


def toy_map(device: str = "cpu", driver: MapsMemory | None = None) -> WeightMap:
    """The engine's own memory for them: q, k, v in one parameter, one parameter strided, all zero.

    On a GPU, or with a `driver`, all of it is one mapping, as an engine's is, which an update can exchange.
    """
    shapes = toy_shapes()
    held = {"qkv": ((32, 16), torch.bfloat16), "strided": ((10, 6), torch.bfloat16)}
    inside = ("layers.0.q.weight", "layers.0.k.weight", "layers.0.v.weight")
    others = {name: of for name, of in shapes.items() if name not in inside and "strid" not in name}
    parameters = _zeros(held | others, torch.device(device), driver)
    qkv, strided = parameters["qkv"], parameters["strided"]
    placements = [
        Placement.whole("layers.0.q.weight", qkv[:16]),
        Placement.whole("layers.0.k.weight", qkv[16:24]),
        Placement.whole("layers.0.v.weight", qkv[24:]),
        Placement.whole("layers.1.strided.weight", strided.t()),
    ]
    placements += [Placement.whole(name, parameters[name]) for name in others]
    return WeightMap(
        placements,
        parameters,
        aliases={ALIAS: "embed.weight"},
        fused={FUSED: list(inside)},
        ignored=lambda name: name.endswith(".inv_freq"),
    )


def _zeros(
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
    driver: MapsMemory | None,
) -> dict[str, torch.Tensor]:
    if device.type == "cpu" and driver is None:
        return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    memory = MappedMemory(sum(map(align, sizes.values())), device, driver)
    raw, first, found = memory.tensor.zero_(), 0, {}
    for name, (shape, dtype) in shapes.items():
        found[name] = raw[first : first + sizes[name]].view(dtype).view(shape)
        found[name]._behind = memory  # type: ignore[attr-defined]  # it lives as long
        first += align(sizes[name])
    return found


class ToyHost:
    """An engine loop that steps all the time on a thread of its own, and writes down what it saw."""

    named: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def __init__(self, weight_map: WeightMap) -> None:
        self.events: list[Any] = []
        self.fail_in: str | None = None
        """Name of the host's method that raises the next time."""
        self.after_write: Callable[[], None] | None = None
        """Called after the bytes of a commit were written, before they are compared."""
        self.mixtures: list[list[float]] = []
        self.blocked = threading.Event()
        self.torn: str | None = None
        self.kv_released = False
        """Whether the memory of a KV cache may be lent."""
        self.kv_lent = False
        self.waiting: dict[str | None, Future[Any]] = {}
        self.looks = True
        """Whether steps look for mixtures; off where a test sends different values on purpose."""
        self._parameters = [p for p in weight_map.parameters.values() if p.numel()]
        self._actions: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._loop, name="toy-loop", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            try:
                action = self._actions.get(timeout=0.002)
            except queue.Empty:
                self._step()
                continue
            if action is None:
                return
            while self.blocked.is_set():
                time.sleep(0.001)
            action()

    def look_away(self) -> None:
        """From the next step on, do not look for mixtures; returns when the last look is over."""
        self.looks = False
        self.between_steps(lambda: None, 5.0)

    def _step(self) -> None:
        if self.looks and self.torn is None:
            values = sorted({float(p.flatten()[i]) for p in self._parameters for i in (0, -1)})
            if len(values) > 1:
                self.mixtures.append(values)

    def between_steps(
        self, action: Callable[[], Any], timeout_s: float, name: str | None = None
    ) -> Any:
        self._maybe_fail("between_steps")
        future: Future[Any] = Future()
        self.waiting[name] = future

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        self._actions.put(run)
        try:
            return future.result(timeout_s)
        except CancelledError:
            raise DeadlineExceeded("the action was given up") from None
        except TimeoutError:
            if future.cancel():
                raise DeadlineExceeded(f"no step boundary within {timeout_s:.3f} s") from None
            return future.result()

    def forgo(self, name: str) -> None:
        if name in self.waiting:
            self.waiting[name].cancel()

    def unwritable(self) -> str | None:
        return None

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lend_kv_cache(self) -> None:
        if not self.kv_released:
            raise WeightUpdateError("the KV cache has its memory")
        self.kv_lent = True
        self.events.append("lend")

    def return_kv_cache(self) -> None:
        self.kv_lent = False
        self.events.append("return")

    def weights_written(self, version: int, label: str | None, kv_policy: str | None) -> None:
        self._maybe_fail("weights_written")
        self.torn = None
        self.events.append(("written", version, label, kv_policy))

    def label_changed(self, label: str) -> None:
        self.events.append(("label", label))

    def hold_outputs(self) -> None:
        self._maybe_fail("hold_outputs")
        self.events.append("hold")

    def release_outputs(self, ok: bool) -> None:
        self.events.append(("release", ok))

    def weights_torn(self, reason: str, version: int, label: str) -> None:
        self.torn = reason
        self.events.append("torn")

    def close(self) -> None:
        self._actions.put(None)
        self._thread.join(5)

    def _maybe_fail(self, where: str) -> None:
        if self.fail_in == where:
            self.fail_in = None
            raise RuntimeError(f"{where} broke on purpose")


class ToyEngine:
    """Receiver, service, and a server where `serve`; what `WeightPublisher` takes as an engine."""

    def __init__(
        self,
        *,
        serve: bool = False,
        bind: str | None = None,
        keep_previous: bool = False,
        device: str = "cpu",
        encodings: Sequence[Encoding] = (FULL,),
        driver: MapsMemory | None = None,
    ) -> None:
        """`driver`: see `toy_map`."""
        self.weight_map = toy_map(device, driver)
        self.host = ToyHost(self.weight_map)
        self.receiver = WeightReceiver(
            self.weight_map, self.host, keep_previous=keep_previous, encodings=encodings
        )
        self.service = WeightService(self.receiver)
        self.server = RpcServer(self.service.handle, WeightRequest, bind=bind) if serve else None
        if self.server is not None:
            self.server.start()

    @property
    def address(self) -> str:
        assert self.server is not None
        return self.server.address

    def weight_channel(self) -> Any:
        if self.server is None:
            return LocalChannel(self.service)
        client = RpcClient(self.address, WeightReply, errors=ERRORS)
        return RpcChannel(client, owned=True)

    @property
    def addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.weight_map.parameters.values()]

    def values(self) -> set[float]:
        """All values that are resident; one per version that they are a mixture of."""
        found: set[float] = set()
        for parameter in self.weight_map.parameters.values():
            found.update(parameter.flatten().float().tolist())
        return found

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self.service.close()
        self.host.close()


class Child(subprocess.Popen[str]):
    """A Python process of a test's own; speak with it through its standard streams."""

    def __init__(self, *arguments: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="child-")
        """For its temporary files: one that is killed removes none."""
        own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": self.folder}
        super().__init__(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **own},
        )


def spawn(script: str, *arguments: str) -> Child:
    """A script of this folder in a process of its own; `collect` it in the end."""
    return Child(str(FOLDER / script), *arguments)


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints; fails when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the child ended early with code {process.wait(5)}"
    return line.strip()


def kill(process: subprocess.Popen[str]) -> None:
    """End it the hard way, and do not collect it at once: it is a zombie for a while, as in life."""
    process.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        if stat.rsplit(")", 1)[1].split()[0] in "ZX":
            return
        time.sleep(0.001)
    raise AssertionError("the child did not die")


def collect(process: Child) -> None:
    """Wait for a child, close its streams and remove its files."""
    if process.poll() is None:
        process.kill()
    process.wait(10)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    shutil.rmtree(process.folder, ignore_errors=True)


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    """Whether `condition` becomes true in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def num_descriptors() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def arenas_mapped() -> int:
    """Memory files of arenas that this process has mapped."""
    with open("/proc/self/maps") as lines:
        return sum("memfd:weight-arena" in line for line in lines)


def one_by_one(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """An iterator that reuses one buffer for all tensors of a dtype, as trainers' iterators do."""
    buffers: dict[torch.dtype, torch.Tensor] = {}
    for name, tensor in tensors.items():
        buffer = buffers.setdefault(tensor.dtype, torch.empty(4096, dtype=tensor.dtype))
        view = buffer[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        yield name, view
        buffer.fill_(-99)
