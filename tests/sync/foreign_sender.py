"""A trainer of another make, in a process of its own: it serializes named tensors as those do, and keeps them alive.

Run with a sharing strategy. For every line on its input, the name of a case, it writes one line of base64 for every
rank and an empty one; it ends when its input does. Others use `Sender`.
"""

import base64
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

KEPT = []


class Sender:
    """Such a process."""

    def __init__(self, strategy="file_system"):
        self._process = subprocess.Popen(
            [sys.executable, __file__, strategy],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def payloads(self, *case):
        """What it sends to every rank, in base64."""
        print(*case, sep="\t", file=self._process.stdin, flush=True)
        return list(iter(lambda: self._process.stdout.readline().strip(), ""))

    def numbers(self, *case):
        """What it says instead, as numbers."""
        return [int(base64.b64decode(text)) for text in self.payloads(*case)]

    def files(self):
        """Its files of shared memory."""
        mine = f"torch_{self._process.pid}_"
        return [name for name in os.listdir("/dev/shm") if name.startswith(mine)]

    def close(self):
        self._process.communicate(timeout=60)


@dataclass
class FlattenedTensorMetadata:
    """As trainers have it, each in a module of its own."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


@dataclass
class LocalSerializedTensor:
    """One tensor, serialized for every rank."""

    values: list


def serialize(value) -> bytes:
    return bytes(ForkingPickler.dumps(value))


def tensors():
    """Every way in which a tensor may lie in its storage; the same values in every process."""
    generator = torch.Generator().manual_seed(7)
    whole = torch.randn(1000, generator=generator)
    return [
        ("matrix", torch.randn(3, 4, generator=generator).bfloat16()),
        ("parameter", torch.nn.Parameter(torch.randn(5, generator=generator))),
        ("frozen", torch.nn.Parameter(torch.arange(4), requires_grad=False)),
        ("empty", torch.empty(0, 7)),
        ("scalar", torch.tensor(2.5, dtype=torch.float64)),
        ("slice", whole[17:41]),
        ("transposed", whole.view(20, 50).T),
        ("strided", whole[::3]),
        ("nothing of a slice", whole[5:5]),
        ("quantised", torch.randn(6, generator=generator).to(torch.float8_e4m3fn)),
        ("mask", torch.tensor([True, False, True])),
        ("twice", whole[100:110]),
    ]


def bucket(named):
    """(flattened_tensor, metadata) without padding, places in bytes."""
    flat, entries, start = [], [], 0
    for name, tensor in named:
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        entries.append(
            FlattenedTensorMetadata(
                name, tensor.shape, tensor.dtype, start, start + raw.numel(), raw.numel()
            )
        )
        start += raw.numel()
        flat.append(raw)
    return {"flattened_tensor": torch.cat(flat), "metadata": entries}


def model_of(folder, seed):
    """The checkpoint after an optimiser step, as it were."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(int(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def gpu_bytes():
    """Of tensors on a GPU that are alive, here or because somebody still reads them."""
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.ipc_collect()
    return torch.cuda.memory_allocated()


def payloads(case, *model):
    if case == "gpu bytes":
        return [str(gpu_bytes()).encode()]
    if case.startswith("gpu"):
        named = list(model_of(*model).to("cuda").named_parameters())
        return [serialize(named if case == "gpu model" else bucket(named))]
    if model:
        named = list(model_of(*model).named_parameters())
        return [serialize(named if case == "model" else bucket(named))]
    named = tensors()
    if case == "named":
        return [serialize(named)]
    if case == "bucket":
        return [serialize(bucket(named))]
    if case == "local":
        parts = [
            (name, LocalSerializedTensor([serialize(tensor), serialize(tensor.detach() * 2)]))
            for name, tensor in named
            if tensor.dtype == torch.float32
        ]
        return [serialize(parts)] * 2
    if case == "ranks":
        return [serialize(named), serialize(tensors())]
    if case == "kept":
        KEPT.append(torch.arange(4.0))
        return [serialize([("kept", KEPT[0]), ("part", KEPT[0][2:])])]
    if case == "wrong bucket":
        parts = bucket([("a", torch.ones(4)), ("b", torch.ones(2))])
        parts["metadata"][1].end_idx += 400
        return [serialize(parts)]
    if case == "expanded":
        return [serialize([("a", torch.ones(1).expand(1 << 40))])]
    assert case == "empties"
    return [serialize([("empty", torch.empty(0, 7))])]


def main(strategy):
    torch.multiprocessing.set_sharing_strategy(strategy)
    for line in sys.stdin:
        for payload in payloads(*line.rstrip("\n").split("\t")):
            print(base64.b64encode(payload).decode())
        print(flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
