"""The files of a run: one line per step, a timeline of requests, and a summary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..grpo.records import StepRecord

METRICS_FILE, TIMELINE_FILE, SUMMARY_FILE = "metrics.jsonl", "timeline.json", "summary.json"

Row = dict[str, Any]


class Recorder:
    """Writes `metrics.jsonl` as the run goes on; one object per line.

    `phase` is "control", "train" or "in_flight"; line with `step` 0 holds only the measurement before the first step.
    `heldout_pass_rate` is None where nothing was measured.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rows: list[Row] = []
        self._file = (folder / METRICS_FILE).open("w", encoding="utf-8")

    def measured(self, phase: str, heldout_pass_rate: float) -> None:
        """A measurement before the first step of a phase."""
        self._write({"phase": phase, "step": 0, "heldout_pass_rate": heldout_pass_rate})

    def step(self, phase: str, record: StepRecord, heldout_pass_rate: float | None) -> None:
        """A step, with the measurement made after it, if any."""
        self._write({"phase": phase, **record.as_row(), "heldout_pass_rate": heldout_pass_rate})

    def keep_timeline(self, records: Iterable[StepRecord]) -> None:
        """Write when every token of these steps was sampled, by which version, and when versions changed."""
        records = list(records)
        timeline = {
            "requests": [
                {
                    "arrived_at": c.token_times[-1] - c.latency_s,
                    "token_times": list(c.token_times),
                    "versions": [[s.version, s.start, s.end] for s in c.spans],
                }
                for record in records
                for c in record.completions
                if c.token_times
            ],
            "commits": [
                {"version": s.version, "time": s.committed_at, "pause_s": s.pause_s}
                for record in records
                for s in record.syncs
            ],
        }
        (self.folder / TIMELINE_FILE).write_text(json.dumps(timeline))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie, the nearest one that occurs; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summarize(rows: Sequence[Row]) -> Row:
    """The numbers that a run is judged by, from its lines."""
    train = [row for row in rows if row["phase"] == "train"]
    steps = [row for row in train if row["step"] > 0]
    control = [row for row in rows if row["phase"] == "control"]
    in_flight = [row for row in rows if row["phase"] == "in_flight"]
    syncs = [sync for row in steps for sync in row["syncs"]]
    return {
        "pass_rate_before": _measurements(train)[0],
        "pass_rate_after": _measurements(train)[-1],
        "control_pass_rate_before": _measurements(control)[0] if control else None,
        "control_pass_rate_after": _measurements(control)[-1] if control else None,
        "control_steps": sum(row["step"] > 0 for row in control),
        "steps": len(steps),
        "num_syncs": len(syncs),
        "version": max((sync["version"] for sync in syncs), default=0),
        "logprob_gap_max": max(row["logprob_gap_max"] for row in steps),
        "logprob_gap_own_max": max(
            (row["logprob_gap_own_max"] for row in steps if row["logprob_gap_own_max"] is not None),
            default=None,
        ),
        "sync_s_p50": percentile([sync["sync_s"] for sync in syncs], 0.5),
        "sync_s_p99": percentile([sync["sync_s"] for sync in syncs], 0.99),
        "pause_s_p50": percentile([sync["pause_s"] for sync in syncs], 0.5),
        "pause_s_p99": percentile([sync["pause_s"] for sync in syncs], 0.99),
        "tokens_per_s_p50": percentile([row["tokens_per_s"] for row in steps], 0.5),
        "mixed_fraction_max": max(row["mixed_fraction"] for row in [*steps, *in_flight]),
        "in_flight_steps": len(in_flight),
    }


def _measurements(rows: Sequence[Row]) -> list[float]:
    return [row["heldout_pass_rate"] for row in rows if row["heldout_pass_rate"] is not None]


def read_rows(folder: Path) -> list[Row]:
    """The lines of a run's `metrics.jsonl`."""
    with (folder / METRICS_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
