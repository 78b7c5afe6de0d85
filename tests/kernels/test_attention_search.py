"""The search for shapes of attention launches: all of it on little data, in the interpreter, and what it stores."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from interpreted import search_interpreted

from rollout_benchmarks.attention_kernels import entries_of, stored
from rollout_benchmarks.attention_problems import searches
from rollout_kernels import attention_configs as configs

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("search") / "found.json"
    return search_interpreted("attention_kernels", file, "--head-dims", "64", "--groups", "1", "4")


def test_every_kind_of_launch_is_searched(found):
    kinds = json.loads(configs.FILE.read_text())["NVIDIA H100 80GB HBM3"]
    assert found["entries"].keys() == kinds.keys()
    for row in found["rows"]:
        assert row["error"] is None and row["seconds"] > 0


def test_what_is_stored_serves_and_other_sizes_of_heads_stay(found, tmp_path, monkeypatch):
    file = tmp_path / "attention_configs.json"
    shutil.copy(configs.FILE, file)
    before = json.loads(file.read_text())["NVIDIA H100 80GB HBM3"]
    stored(file, "NVIDIA H100 80GB HBM3", json.loads(json.dumps(found["entries"])))
    after = json.loads(file.read_text())["NVIDIA H100 80GB HBM3"]
    for kind, listed in before.items():
        kept = [entry for entry in listed if entry["max_head_dim"] > 64]
        assert [entry for entry in after[kind] if entry["max_head_dim"] > 64] == kept
        assert [entry for entry in after[kind] if entry["max_head_dim"] == 64] == (
            found["entries"][kind]
        )
    monkeypatch.setattr(configs, "FILE", file)
    monkeypatch.setattr(configs, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    configs._entries.cache_clear()
    try:
        facts = {"head_dim": 64, "group": 1, "dtype": torch.bfloat16}
        best = found["entries"]["decode_after_prefix"][0]
        chosen = configs.decode_config(CUDA, **facts, programs=300, after_prefix=True)
        assert (chosen.keys, chosen.warps, chosen.stages) == (
            *(best["keys"], best["warps"], best["stages"]),
        )
    finally:
        configs._entries.cache_clear()


def test_groups_with_the_same_best_candidate_share_an_entry():
    each = next(each for each in searches((64,), 4) if each.name == "decode")
    first, second = each.candidates[:2]
    entries = entries_of(each, {1: first, 2: first, 4: second, 8: second})
    assert [entry.get("max_group") for entry in entries] == [2, None]
    assert [entry["warps"] for entry in entries] == [first.warps, second.warps]
    assert all(entry["max_programs"] == 256 for entry in entries)


def test_nothing_is_stored_without_a_gpu(monkeypatch):
    from rollout_benchmarks.attention_kernels import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--write"])
