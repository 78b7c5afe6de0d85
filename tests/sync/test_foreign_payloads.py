"""Payloads by torch's own `ForkingPickler`, from another process, are read without unpickling, and given back."""

import base64
import os
import struct
from pathlib import Path

import pytest
import torch
from foreign_sender import Sender, serialize, tensors
from ipc_stand_in import MemoryFiles
from torch.multiprocessing import reductions

from weight_sync import read_serialized_named_tensors
from weight_sync.errors import ManifestMismatch, PayloadRefused, TransportError
from weight_sync.foreign import gpu_storages


@pytest.fixture(scope="module")
def sender():
    """A process that shares by files."""
    sender = Sender()
    yield sender
    sender.close()


@pytest.fixture(scope="module")
def descriptor_sender():
    """A process that shares by descriptors, torch's default on Linux."""
    sender = Sender("file_descriptor")
    yield sender
    sender.close()


def assert_equal(named, expected):
    assert [name for name, _ in named] == [name for name, _ in expected]
    for (name, got), (_, want) in zip(named, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        assert torch.equal(got.view(torch.uint8) if got.dtype.itemsize == 1 else got,
                           want.view(torch.uint8) if got.dtype.itemsize == 1 else want), name  # fmt: skip


@pytest.mark.parametrize("case", ["named", "bucket"])
def test_what_another_process_serialized_is_read_as_it_was(sender, case):
    assert_equal(read_serialized_named_tensors(sender.payloads(case)), tensors())


def test_what_was_read_outlives_its_sender():
    sender = Sender()
    named = read_serialized_named_tensors(sender.payloads("named"))
    sender.close()
    assert_equal(named, tensors())


def test_bytes_are_read_like_their_base64(sender):
    raw = base64.b64decode(sender.payloads("named")[0])
    assert_equal(read_serialized_named_tensors(raw), tensors())


def test_a_payload_that_was_read_holds_no_memory_of_its_living_sender(sender):
    before = set(sender.files())
    payloads = sender.payloads("named")
    # The sender has dropped its tensors: only the reader's references keep the files.
    assert set(sender.files()) > before
    read_serialized_named_tensors(payloads)
    assert set(sender.files()) == before


def test_a_payload_is_read_once_and_then_says_so(sender):
    payloads = sender.payloads("named")
    read_serialized_named_tensors(payloads)
    with pytest.raises(TransportError, match="was read already"):
        read_serialized_named_tensors(payloads)


def test_a_sender_that_keeps_its_tensors_keeps_their_file(sender):
    before = set(sender.files())
    named = read_serialized_named_tensors(sender.payloads("kept"))
    assert [tensor.tolist() for _, tensor in named] == [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0]]
    assert len(set(sender.files()) - before) == 1


def test_each_rank_reads_its_own_and_the_others_are_given_back(sender):
    before = set(sender.files())
    assert_equal(read_serialized_named_tensors(sender.payloads("ranks"), rank=1), tensors())
    assert set(sender.files()) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tensor_that_was_serialized_for_every_rank_is_read_for_one(sender, rank):
    expected = [
        (name, tensor.detach() * (rank + 1))
        for name, tensor in tensors()
        if tensor.dtype == torch.float32
    ]
    named = read_serialized_named_tensors(sender.payloads("local"), rank=rank)
    assert_equal(named, expected)


def test_descriptors_that_only_a_child_process_can_ask_for_are_refused_with_the_remedy(
    descriptor_sender,
):
    with pytest.raises(PayloadRefused, match=r"set_sharing_strategy\('file_system'\)"):
        read_serialized_named_tensors(descriptor_sender.payloads("named"))


def test_tensors_without_bytes_are_read_under_both_sharing_strategies(sender, descriptor_sender):
    for process in (sender, descriptor_sender):
        [(name, tensor)] = read_serialized_named_tensors(process.payloads("empties"))
        assert (name, tensor.shape) == ("empty", (0, 7))


def test_an_empty_bucket_is_valid():
    payload = serialize({"flattened_tensor": torch.empty(0, dtype=torch.uint8), "metadata": []})
    assert read_serialized_named_tensors(payload) == []


def test_metadata_that_do_not_fit_their_bucket_are_refused(sender):
    with pytest.raises(ManifestMismatch, match="b: got bytes 16 to 424"):
        read_serialized_named_tensors(sender.payloads("wrong bucket"))


def test_an_expanded_tensor_is_refused_before_it_is_as_large_as_it_says(sender):
    with pytest.raises(PayloadRefused, match="expanded"):
        read_serialized_named_tensors(sender.payloads("expanded"))


@pytest.mark.parametrize("count", [0, 2])
def test_a_rank_without_a_payload_is_refused(count):
    with pytest.raises(PayloadRefused, match=f"got {count} payloads"):
        read_serialized_named_tensors([b"\x80\x04]."] * count, rank=2)


# ---- memory of GPUs: torch's call, over a stand-in for the memory ----------------------------------------------------


class OnGpu:
    """What torch makes of a CUDA tensor: a call of `rebuild_cuda_tensor`."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return reductions.rebuild_cuda_tensor, self.arguments


@pytest.fixture
def gpu(monkeypatch):
    """Memory of a GPU that is a file: its allocation's bytes, and a function that exports a part of it."""
    memory = MemoryFiles()
    allocation = memory.allocate(4096)
    handle, _ = memory.export(allocation)
    allocation.tensor.copy_(torch.arange(4096) % 251)
    counters = Path(f"/dev/shm/torch_{os.getpid()}_1_1")
    counters.write_bytes(struct.pack("<i60x", 1) + struct.pack("<q", 1) * 10_000)
    name = f"/{counters.name}".encode()
    monkeypatch.setattr(gpu_storages, "ipc_memory_of", lambda device: memory)
    monkeypatch.setattr(gpu_storages, "_device", lambda number: torch.device("cpu"))

    def export(shape, stride, offset, *, at, size, counter, prefix=b"\x02c", device=0):
        return OnGpu(
            *(torch.Tensor, torch.Size(shape), stride, offset, torch.storage.TypedStorage),
            *(torch.float32, device, prefix + handle, size, at, False, name, counter, b"", False),
        )

    def counts():
        return list(struct.unpack_from("<10q", counters.read_bytes(), 64))

    yield export, allocation.tensor, counts, memory
    memory.free(allocation)
    counters.unlink()


@pytest.mark.parametrize(
    "device", [0, "GPU-" + "-".join(["0" * 8, "0" * 4, "0" * 4, "0" * 4, "0" * 12])]
)
@pytest.mark.parametrize("prefix", [b"", b"\x01c", b"\x02c"])
def test_tensors_in_memory_of_a_gpu_are_copied_and_counted_down(gpu, prefix, device):
    export, bytes_of, counts, memory = gpu
    more = {"prefix": prefix, "device": device}
    payload = serialize(
        [
            ("a", export((2, 3), (3, 1), 1, at=512, size=64, counter=3, **more)),
            ("b", export((4,), (2,), 0, at=1024, size=64, counter=4, **more)),
            ("c", export((3, 2), (1, 3), 4, at=512, size=64, counter=5, **more)),
        ]
    )
    named = dict(read_serialized_named_tensors(payload))
    whole = bytes_of.view(torch.float32)
    assert torch.equal(named["a"], whole[129:135].view(2, 3))
    assert torch.equal(named["b"], whole[256:263:2])
    assert torch.equal(named["c"], whole[132:138].view(2, 3).T)
    assert counts()[2:7] == [1, 0, 0, 0, 1]
    assert memory.num_opened == 1 and memory._open == {}


def test_a_storage_beyond_its_allocation_is_refused_and_the_allocation_closed(gpu):
    export, _, counts, memory = gpu
    payload = serialize([("a", export((2,), (1,), 0, at=4090, size=64, counter=3))])
    with pytest.raises(TransportError, match="got bytes 4090 to 4154"):
        read_serialized_named_tensors(payload)
    assert memory._open == {} and counts()[3] == 1


def test_memory_of_expandable_segments_is_refused_with_the_remedy(gpu):
    export = gpu[0]
    payload = serialize([("a", export((2,), (1,), 0, at=0, size=64, counter=3, prefix=b"\x02e"))])
    with pytest.raises(PayloadRefused, match="expandable_segments:False"):
        read_serialized_named_tensors(payload)
