"""The report of an update, and the package's public names."""

from __future__ import annotations

import dataclasses

import pytest

import weight_sync
from weight_sync.report import SyncReport


def report(**fields: object) -> SyncReport:
    base = {"version": 17, "label": "step-17", "num_tensors": 309, "num_bytes": 1_192_099_840}
    return SyncReport(**{**base, "updated": 309, **fields})


def test_a_report_unpacks_as_success_and_message() -> None:
    success, message = report(message="done")
    assert (success, message) == (True, "done")
    assert tuple(report()) == (True, report().message)


def test_the_message_is_one_line_that_says_what_happened() -> None:
    text = str(
        report(
            transport="shared_memory",
            begin_to_committed_s=0.0873,
            pause_s=0.0421,
            casts=(("a", "float32", "bfloat16"), ("b", "float32", "bfloat16")),
            left=("w", "x", "y", "z"),
        )
    )
    assert text == (
        "version 17 ('step-17'): 309 tensors, 1.19 GB by shared_memory; committed in 87.3 ms "
        "(pause 42.1 ms); 2 cast (float32 to bfloat16); 4 left as they were: w, x, y, ..."
    )
    assert repr(report(label=None)).startswith("SyncReport(version 17: 309 tensors, 1.19 GB")


def test_a_report_is_frozen_and_says_whether_it_was_complete() -> None:
    assert report().complete
    assert not report(left=("w",)).complete
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().version = 18


def test_every_public_name_can_be_had() -> None:
    for name in weight_sync.__all__:
        assert getattr(weight_sync, name) is not None
    assert set(weight_sync.__all__) <= set(dir(weight_sync))
    with pytest.raises(AttributeError, match="no attribute 'publish'"):
        weight_sync.publish  # noqa: B018
