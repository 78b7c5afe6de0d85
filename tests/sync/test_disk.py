"""Checkpoints as a transport: whole or not there, checked by name, and readable by others."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sync_support import ToyEngine, one_by_one, weights
from torch import nn

import weight_sync
from weight_sync import (
    FingerprintMismatch,
    ManifestMismatch,
    TransportError,
    WeightPublisher,
    read_checkpoint,
    write_checkpoint,
)


def test_what_is_written_is_read_bit_for_bit_with_version_and_label(tmp_path: Path) -> None:
    tensors = weights(1.5)
    tensors["embed.weight"] = torch.randn(16, 24).to(torch.bfloat16).t()
    folder = write_checkpoint(tmp_path / "a" / "step", tensors, version=17, label="step 17")
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.version, checkpoint.label) == (17, "step 17")
    read = dict(checkpoint.tensors)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert checkpoint.fingerprints == {
        name: weight_sync.tensor_fingerprint(tensor) for name, tensor in tensors.items()
    }
    assert sorted(os.listdir(folder)) == ["manifest.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["step"]


def test_shards_have_an_index_that_others_read(tmp_path: Path) -> None:
    tensors = weights(2.0)
    folder = write_checkpoint(tmp_path / "x", one_by_one(tensors), max_shard_bytes=400)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(folder / file)[name], tensors[name])
    (folder / "manifest.json").unlink()
    assert dict(read_checkpoint(folder).tensors).keys() == tensors.keys()


def test_tied_modules_and_no_tensors_at_all_can_be_written(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 8, bias=False), "b": nn.Linear(4, 8, bias=False)})
    model["b"].weight = model["a"].weight
    folder = write_checkpoint(tmp_path / "tied", model.state_dict())
    assert set(dict(read_checkpoint(folder).tensors)) == {"a.weight", "b.weight"}
    assert set(dict(read_checkpoint(write_checkpoint(tmp_path / "m", model)).tensors)) == {
        "a.weight"
    }
    assert dict(read_checkpoint(write_checkpoint(tmp_path / "none", {})).tensors) == {}


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from list(weights(1.0).items())[:4]
        raise RuntimeError("the trainer broke")

    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path / "x", broken(), max_shard_bytes=100)
    with pytest.raises(ManifestMismatch, match="a: sent more than once"):
        write_checkpoint(tmp_path / "x", [("a", torch.zeros(1)), ("a", torch.zeros(1))])
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", weights(1.0), version=1)
    with pytest.raises(TransportError, match="the folder exists"):
        write_checkpoint(tmp_path / "x", weights(2.0), version=2)
    assert read_checkpoint(tmp_path / "x").version == 1
    write_checkpoint(tmp_path / "x", weights(2.0), version=2, overwrite=True)
    assert read_checkpoint(tmp_path / "x").version == 2
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_is_replaced_is_whole_under_its_name_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "x", weights(1.0), version=1)
    seen: list[int | None] = []

    def look_and_die(*arguments: Any, **options: Any) -> None:
        seen.append(read_checkpoint(tmp_path / "x").version)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        for name in ("os.rename", "os.open", "shutil.rmtree"):
            patched.setattr(f"weight_sync.transports.disk.{name}", look_and_die)
            with pytest.raises(KeyboardInterrupt):
                write_checkpoint(tmp_path / "x", weights(2.0), version=2, overwrite=True)
            patched.undo()
    assert len(seen) >= 3 and set(seen) <= {1, 2}
    assert dict(read_checkpoint(tmp_path / "x").tensors).keys() == weights(1.0).keys()


def test_a_full_disk_is_a_typed_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", weights(1.0), version=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(TransportError, match="with room for all tensors"):
            write_checkpoint(tmp_path / "x", weights(2.0), version=2, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_checkpoint(tmp_path / "x").version == 1
    assert os.listdir(tmp_path) == ["x"]


def tamper(path: Path, at: int, value: int = 0x55) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= value
    path.write_bytes(data)


def test_a_changed_byte_is_refused_by_name_and_the_old_version_serves(
    tmp_path: Path, engine: ToyEngine
) -> None:
    folder = write_checkpoint(tmp_path / "x", weights(1.0))
    tamper(folder / "model.safetensors", -1)
    with WeightPublisher(engine) as publisher:
        with pytest.raises(
            FingerprintMismatch, match=r"(weight|scale) in .*model.safetensors is not"
        ):
            publisher.publish(read_checkpoint(folder).tensors)
        assert engine.values() == {0.0}
        assert publisher.publish(weights(2.0)).version == 1


@pytest.mark.parametrize("damage", ["truncated", "file gone", "tensor gone", "header"])
def test_an_incomplete_folder_is_refused_before_its_bytes_are_read(
    tmp_path: Path, damage: str
) -> None:
    folder = write_checkpoint(tmp_path / "x", weights(1.0))
    path = folder / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "file gone":
        path.unlink()
    elif damage == "tensor gone":
        save_file({"norm.weight": torch.zeros(7)}, path)
    else:
        tamper(path, 0, 0xFF)
    with pytest.raises((TransportError, ManifestMismatch), match="write or download"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "another format"),
        ({"surprise": 1}, "surprise"),
        ({"tensors": [{"name": "a"}]}, "missing required field"),
        (
            {
                "tensors": [
                    {
                        "name": "a",
                        "shape": [1],
                        "dtype": "float32",
                        "file": "../../etc/x.safetensors",
                        "fingerprint": "0" * 16,
                    }
                ]
            },
            "file",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    folder = write_checkpoint(tmp_path / "x", weights(1.0))
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TransportError, match=text):
        read_checkpoint(folder)
    path.write_text("not json")
    with pytest.raises(TransportError, match=r"manifest.json cannot be read"):
        read_checkpoint(folder)


def test_a_folder_without_our_manifest_is_taken_as_it_is(tmp_path: Path, engine: ToyEngine) -> None:
    tensors = weights(3.0)
    save_file(dict(list(tensors.items())[:5]), tmp_path / "a.safetensors")
    save_file(dict(list(tensors.items())[5:]), tmp_path / "b.safetensors")
    index = {"weight_map": {"here": "a.safetensors", "there": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.version, checkpoint.label, checkpoint.fingerprints) == (None, None, None)
    with WeightPublisher(engine) as publisher:
        publisher.publish(checkpoint.tensors)
    assert engine.values() == {3.0}


def test_a_place_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="no weights in"):
        read_checkpoint(tmp_path)
    with pytest.raises(TransportError, match="no checkpoint folder"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(TransportError, match="weight_map"):
        read_checkpoint(tmp_path)
