"""The stored shapes of attention launches."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import product

import pytest
import torch

from rollout_kernels import attention_configs as configs
from rollout_kernels.shared_prefixes import PREFIX_UNIT

DEVICES = list(json.loads(configs.FILE.read_text()))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)
CPU = torch.device("cpu")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(configs, "device_name", lambda device: request.param)
    return CPU


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_call_has_an_entry(device, dtype):
    for head_dim, group in product(HEAD_DIMS, (1, 2, 7, 16, 71)):
        facts = {"head_dim": head_dim, "group": group, "dtype": dtype}
        for exact in (False, True):
            assert configs.shared_config(device, **facts, deterministic=exact).keys <= PREFIX_UNIT
            for programs in (1, 200, 5000):
                configs.decode_config(device, **facts, programs=programs, deterministic=exact)
            for rows, block_size in product((1, 40, 9000), (16, 32, 64, 256)):
                facts |= {"rows": rows, "block_size": block_size}
                configs.prefill_config(device, **facts, deterministic=exact)
                del facts["rows"], facts["block_size"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_kernels_agree_on_their_tiles(device, dtype):
    for head_dim in HEAD_DIMS:
        facts = {"head_dim": head_dim, "group": 4, "dtype": dtype, "deterministic": True}
        keys = {configs.shared_config(device, **facts).keys}
        keys |= {configs.decode_config(device, **facts, programs=n).keys for n in (1, 5000)}
        for rows, block_size in product((1, 9000), (16, 32, 64)):
            chosen = configs.prefill_config(device, **facts, rows=rows, block_size=block_size)
            keys.add(chosen.keys)
        assert len(keys) == 1


def test_entries_say_nothing_that_is_not_read():
    kinds = {
        "decode": configs.DecodeConfig,
        "shared": configs.SharedConfig,
        "prefill": configs.PrefillConfig,
    }
    limits = {"dtype_bytes", "max_head_dim", "max_group", "max_programs", "max_rows", "whole_tiles"}
    stored = json.loads(configs.FILE.read_text())
    for entries in stored.values():
        if isinstance(entries, str):
            assert entries in stored
            continue
        for kind, listed in entries.items():
            known = {field.name for field in fields(kinds[kind.partition("_")[0]])}
            for entry in listed:
                assert set(entry) <= known | limits, entry
