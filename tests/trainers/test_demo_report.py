"""The report is drawn from the recorded files alone and needs nothing else."""

import json
import random
import re

import pytest

from trainers_integration.demo.figures import logprob_gap
from trainers_integration.demo.recorder import (
    METRICS_FILE,
    TIMELINE_FILE,
    percentile,
    read_rows,
    summarize,
)
from trainers_integration.demo.report import write_report
from trainers_integration.demo.screen import summary_lines
from trainers_integration.demo.timeline import (
    busiest_commit,
    colors_of,
    covering,
    evenly,
    idle_times,
    versions_between,
)


def row(phase, step, pass_rate, *, gap=1e-6, own=None, versions=(), heldout=None):
    return {
        "phase": phase,
        "step": step,
        "reward": pass_rate + 0.1,
        "pass_rate": pass_rate,
        "tokens_per_s": 1000.0,
        "mixed_fraction": 0.0 if phase == "train" else 0.25,
        "logprob_gap_max": gap,
        "logprob_gap_mean": gap / 10,
        "logprob_gap_own_max": gap if own is None else own,
        "staleness": 0.0 if phase == "train" else 1.5,
        "syncs": [
            {
                "version": v,
                "started_at": v,
                "committed_at": v,
                "sync_s": v * 1e-3,
                "pause_s": v * 1e-4,
            }
            for v in versions
        ],
        "heldout_pass_rate": heldout,
    }


def rows():
    return [
        {"phase": "control", "step": 0, "heldout_pass_rate": 0.3},
        row("control", 1, 0.31, gap=2.0),
        row("control", 2, 0.29, gap=3.0, heldout=0.28),
        {"phase": "train", "step": 0, "heldout_pass_rate": 0.31},
        *(row("train", i, 0.3 + 0.1 * i, versions=[i]) for i in (1, 2, 3)),
        row("train", 4, 0.7, gap=2e-6, versions=[4], heldout=0.82),
        row("in_flight", 5, 0.8, gap=0.5, own=2e-6, versions=[5, 6]),
    ]


def timeline():
    return {
        "requests": [
            {
                "arrived_at": 100.0 + i / 100,
                "token_times": [100.02 + i / 100 + t / 50 for t in range(3)],
                "versions": [[4, 0, 3]] if i < 5 else [[4, 0, 1], [5, 1, 3]],
            }
            for i in range(8)
        ],
        "commits": [
            {"version": 5, "time": 100.09, "pause_s": 1e-3},
            {"version": 6, "time": 100.4, "pause_s": 1e-3},
        ],
    }


@pytest.fixture
def recorded(tmp_path):
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in rows()))
    (tmp_path / TIMELINE_FILE).write_text(json.dumps(timeline()))
    return tmp_path


def summary(mode="sync"):
    return summarize(rows()) | {"algorithm": "grpo", "mode": mode, "seed": 0, "seconds": 1.0}


def test_the_summary_is_about_the_run_and_not_about_its_control_or_what_came_after():
    numbers = summary()
    assert numbers["pass_rate_before"] == 0.31
    assert numbers["pass_rate_after"] == 0.82
    assert numbers["control_pass_rate_before"] == 0.3
    assert numbers["control_pass_rate_after"] == 0.28
    assert numbers["logprob_gap_max"] == 2e-6
    assert (numbers["num_syncs"], numbers["version"], numbers["steps"]) == (4, 4, 4)
    assert numbers["pause_s_p99"] == 4e-4
    assert numbers["mixed_fraction_max"] == 0.25


def test_a_run_without_a_control_has_a_summary():
    numbers = summarize([r for r in rows() if r["phase"] != "control"])
    assert numbers["control_pass_rate_after"] is None
    assert numbers["control_steps"] == 0


def test_the_report_needs_nothing_from_elsewhere(recorded):
    pictures = write_report(recorded, summary(), settings={"a<b": 1})
    page = (recorded / "report.html").read_text()
    assert {path.name for path in pictures} == {
        "learning.png",
        "logprob_gap.png",
        "timeline.png",
        "sync.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert not re.search(r"https?://|<script|<link|url\(", page)
    assert "0.31 → 0.82" in page
    assert "a&lt;b" in page


def async_rows():
    found = [row("train", i, 0.5, gap=0.5 * i, own=1e-6 * i, versions=[i]) for i in (1, 2, 3)]
    found[0]["logprob_gap_own_max"] = None
    return [{"phase": "train", "step": 0, "heldout_pass_rate": 0.3}] + [
        r | {"staleness": 1.5, "heldout_pass_rate": 0.5} for r in found
    ]


def test_the_gap_of_an_asynchronous_run_is_told_by_version():
    numbers = summarize(async_rows()) | {
        "algorithm": "grpo",
        "mode": "async",
        "seed": 0,
        "seconds": 1.0,
    }
    assert (numbers["logprob_gap_max"], numbers["logprob_gap_own_max"]) == (1.5, 3e-6)
    lines = dict(summary_lines(numbers))
    assert lines["log-probability gap, trainer's own version"] == "3.0e-06"
    assert "importance weights" in lines["the same, also earlier versions"]
    assert dict(summary_lines(summary()))["log-probability gap, largest"] == "2.0e-06"
    (ax,) = logprob_gap(async_rows()).axes
    labels = {line.get_label(): line for line in ax.lines}
    own = labels["completions that the trainer's own version sampled, largest"]
    assert own.get_xydata().tolist() == [[2, 2e-6], [3, 3e-6]]


def test_no_two_versions_in_a_picture_have_one_colour():
    for num in (3, 12, 40):
        colors = colors_of(range(100, 100 + num), {})
        assert list(colors) == list(range(100, 100 + num))
        more = colors_of(range(num), colors)
        assert len({*colors.values(), *more.values()}) == 2 * num


def lived(start, end, version=1):
    return {
        "arrived_at": start,
        "token_times": [(start + end) / 2, end],
        "versions": [[version, 0, 2]],
    }


def test_a_gap_between_rows_is_a_time_without_requests():
    rng = random.Random(5)
    requests = [lived(s, s + 0.3) for s in sorted(rng.uniform(0, 10) for _ in range(300))]
    requests += [lived(s, s + 0.3) for s in sorted(rng.uniform(12, 20) for _ in range(300))]
    shown = covering(requests, 120)
    assert len(shown) == 120
    assert shown == sorted(shown, key=requests.index)
    assert idle_times(shown) == idle_times(requests)
    assert any(end - start > 1.5 for start, end in idle_times(requests))
    assert covering(requests[:5], 9) == requests[:5]
    assert len(covering(requests, 7)) == 7


def test_the_legend_has_the_versions_that_can_be_seen():
    requests = [lived(0.0, 1.0, 1), lived(2.0, 3.0, 2), lived(4.0, 5.0, 3)]
    assert versions_between(requests, 0.9, 3.5) == {1, 2}


def test_a_run_without_a_timeline_has_a_report(recorded):
    (recorded / TIMELINE_FILE).unlink()
    names = [path.name for path in write_report(recorded, summary("async"), settings={})]
    assert "timeline.png" not in names


def test_a_timeline_in_which_no_request_met_a_commit_is_drawn(recorded):
    data = timeline()
    data["requests"] = data["requests"][:2]
    data["commits"] = [{"version": v, "time": 200.0 + v, "pause_s": 1e-3} for v in (5, 6)]
    (recorded / TIMELINE_FILE).write_text(json.dumps(data))
    write_report(recorded, summary(), settings={})
    assert (recorded / "timeline.png").stat().st_size > 10_000


def test_rows_are_read_as_they_were_written(recorded):
    assert read_rows(recorded) == rows()


def test_the_close_up_shows_the_commit_that_most_requests_met():
    data = timeline()
    assert busiest_commit(data["requests"], data["commits"]) == 0
    assert busiest_commit(data["requests"], data["commits"][::-1]) == 1


def test_rows_are_spread_evenly_from_first_to_last():
    assert evenly(list(range(100)), 4) == [0, 33, 66, 99]
    assert evenly([1, 2], 4) == [1, 2]


@pytest.mark.parametrize(
    ("values", "share", "expected"), [([], 0.5, 0.0), ([3, 1, 2], 0.5, 2), (range(101), 0.99, 99)]
)
def test_a_percentile_is_a_value_that_occurs(values, share, expected):
    assert percentile(values, share) == expected
