"""`tests/gpu_checks.py` on a CPU: what it makes of parts that pass, fail, hang or find no GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import gpu_checks
from gpu_checks import Checks, Part, all_parts, chosen, figures, suite

TESTS = gpu_checks.ROOT / "tests"
TEST_FILE = """
import time
import pytest
def test_before(): pass
def test_that_hangs(): time.sleep(100)
def test_behind(): pass
@pytest.mark.skip
def test_skipped(): pass
"""
PYTEST = (
    "-m",
    "pytest",
    "-v",
    "-p",
    "no:cacheprovider",
    "-p",
    "gpu_checks",
    "-c",
    "{out}/none.ini",
)


def command(code: str, name: str = "command", **options: Any) -> Part:
    return Part(name=name, command=("-c", code), kind="command", gpus=0, limit_s=30.0, **options)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "none.ini").write_text("[pytest]\n")
    return tmp_path


def test_a_test_that_hangs_is_ended_and_those_behind_it_run(out: Path) -> None:
    (out / "test_three.py").write_text(TEST_FILE)
    hanging = Part(
        name="hanging",
        command=(*PYTEST, str(out / "test_three.py")),
        gpus=0,
        test_s=2.0,
        limit_s=120.0,
    )
    checks = Checks(out, [hanging], [])
    checks.run()
    outcome = checks.outcomes["hanging"]
    counts = [outcome.count(how) for how in ("passed", "failed", "skipped")]
    assert (outcome.state, counts) == ("failed", [2, 1, 1])
    assert "test_that_hangs: took more than 2 s" in outcome.why
    assert "test_that_hangs" in (out / "table.txt").read_text()


def test_a_part_that_takes_too_long_or_fails_leaves_the_others_alone(out: Path) -> None:
    slow = Part(
        name="slow",
        command=("-c", "import time; print('so far', flush=True); time.sleep(100)"),
        kind="command",
        gpus=0,
        limit_s=1.5,
    )
    parts = [slow, command("raise SystemExit(3)", "bad"), command("print('fine')", "good")]
    checks = Checks(out, [*parts, command("", "far")], [])
    object.__setattr__(checks.parts[-1], "gpus", 2)
    start = time.monotonic()
    checks.run()
    assert time.monotonic() - start < 30
    states = {name: (outcome.state, outcome.why) for name, outcome in checks.outcomes.items()}
    assert states == {
        "slow": ("failed", "ended after its 2 s"),
        "bad": ("failed", "exit status 3"),
        "good": ("passed", ""),
        "far": ("not run", "needs 2 GPUs, got 0"),
    }
    assert "so far" in (out / "tests.log").read_text()


def test_what_has_passed_is_not_run_again_unless_it_is_named(out: Path) -> None:
    counted = command(f"open({str(out / 'runs')!r}, 'a').write('x')")
    for again, runs in ((False, "x"), (False, "x"), (True, "xx")):
        Checks(out, [counted], []).run(again=again)
        assert (out / "runs").read_text() == runs
    Checks(out, [command("", "late")], []).run(total_s=0.0)
    known = json.loads((out / "results.json").read_text())["parts"]
    assert known["late"]["state"] == "not run" and known["command"]["state"] == "passed"


def test_benchmarks_come_after_tests_and_bring_their_results(out: Path) -> None:
    row = {"what": "a copy", "measured": "3 ms", "floor": "2 ms", "ratio": "1.5"}
    result = {"headline": [{**row, "target": "at most 1.2", "met": False}]}
    code = f"import sys; open(sys.argv[1], 'w').write({json.dumps(json.dumps(result))})"
    timed = Part(
        name="timed", command=("-c", code, "{json}"), kind="benchmark", gpus=0, limit_s=30.0
    )
    checks = Checks(out, [timed, command("print(1)")], [])
    checks.run()
    assert list(checks.outcomes) == ["command", "timed"]
    assert checks.outcomes["timed"].result == result
    assert "a copy: 3 ms, 1.5 of 2 ms; at most 1.2: MISSED" in (out / "table.txt").read_text()
    assert len(list(out.iterdir())) <= 8
    assert list(figures(None)) == []
    nothing = Checks(out, [Part(name="no", command=("-c", ""), kind="benchmark", gpus=0)], [])
    nothing.run()
    assert nothing.outcomes["no"].why == "no result"


def test_parts_share_gpus_but_those_that_want_them_alone(out: Path) -> None:
    checks = Checks(out, [], ["0", "1"])
    few, alone = suite("few", "x"), suite("alone", "x", alone=True)
    both = suite("both", "x", gpus=2)
    assert [checks._take(part) for part in (few, few, alone, both)] == [
        ["0"],
        ["1"],
        None,
        ["0", "1"],
    ]
    fresh = Checks(out, [], ["0", "1"])
    found = [fresh._take(part) for part in (alone, few, both, alone)]
    assert found == [["0"], ["1"], None, None]


def test_a_part_for_two_gpus_may_make_do_with_one(out: Path) -> None:
    both, either = suite("both", "x", gpus=2), suite("either", "x", gpus=2, least=1)
    one, two = Checks(out, [], ["0"]), Checks(out, [], ["0", "1"])
    assert one._take(either) == ["0"] and two._take(either) == ["0", "1"]
    checks = Checks(out, [both, command("print(1)", "any")], ["0"])
    checks.run()
    assert {name: (outcome.state, outcome.why) for name, outcome in checks.outcomes.items()} == {
        "both": ("not run", "needs 2 GPUs, got 1"),
        "any": ("passed", ""),
    }


def test_names_choose_parts_and_are_all_different() -> None:
    parts = all_parts()
    assert len({part.name for part in parts}) == len(parts)
    assert [p.name for p in chosen(parts, ["memory", "sync"])] == [
        *("memory", "sync-small", "sync-large", "sync-experts")
    ]
    assert [p.name for p in chosen(parts, ["experts"])] == ["experts"]
    with pytest.raises(SystemExit, match="pigeon"):
        chosen(parts, ["pigeon"])


def test_settings_of_benchmarks_are_known() -> None:
    from rollout.settings import load_settings
    from rollout_benchmarks.settings import BenchSettings

    for part in all_parts():
        words = part.command
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        load_settings(BenchSettings, None, settings)


def test_every_test_that_needs_a_gpu_is_in_a_part() -> None:
    named = {word for part in all_parts() for word in part.command}
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text()
        if "mark.gpu" not in text and ".as_tests(" not in text:
            continue
        if path.stem in ("test_gpu_checks", "test_gpu_faults"):  # its cells are the part `faults`
            continue
        assert f"tests/{path.relative_to(TESTS)}" in named, path
    for part in all_parts():
        for word in part.command:
            assert not word.startswith("tests/") or (TESTS.parent / word).exists(), word
