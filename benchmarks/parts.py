"""Where the time of an update goes, as its report has it: one table for all benchmarks of updates."""

from __future__ import annotations

from weight_sync import SyncReport


def parts_of(report: SyncReport) -> dict[str, float]:
    """Seconds of each part, by name; parts overlap and contain each other (see docs/performance.md)."""
    return {
        "pack": report.pack_s,
        "check_staged": report.stage_s,
        "copy": report.copy_s,
        "verify": report.verify_s,
        "pause": report.pause_s,
        "begin_to_committed": report.begin_to_committed_s,
        "begin_to_verified": report.begin_to_verified_s,
    }
