"""Writes `docs/faults.md` from what a run of the fault tests left in a folder: `python docs/write_faults.py FOLDER`.

`make faults` runs the tests and this. A case that did not pass leaves no row, and then nothing is written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "faults"))

from fault_matrix import CASES  # noqa: E402

HEAD = """# Faults

What happens when a process dies (`kill -9`) or lies in the middle of a weight update, as seen by tests with real
processes: engines of one rank and of two (`tests/faults/test_engine_*.py`). Each rank can be stopped exactly at the
named phase. "Serves, whole" means: the fingerprint of the resident bytes, and greedy tokens and log-probabilities
against transformers, are those of one version on all ranks, and a client that streamed throughout got only tokens of
the version that their span names.

| phase | the engine is stopped |
|---|---|
| idle | nowhere: no update is under way, a trainer's arena may be open |
| generating | nowhere: a request is running |
| begin, stage | before it opens the session; before it receives or checks the first bucket |
| stage, process_group, trainer killed | nowhere: all ranks wait for bytes of the second bucket, which is announced |
| vote | before the rank says that it can commit |
| commit | inside the pause: this rank's bytes are new, the other rank's may not be, nothing is compared yet |

Seconds are from the fault until the next version served or until nobody waited any more, on the machine of that run,
which runs other tests at the same time. `make faults` writes this file; a test compares it with the list of cases.

| who | phase | transport | ranks | what happens | seconds | |
|---|---|---|--:|---|--:|---|
"""


def main() -> int:
    """Returns the exit code: 1 when a case has no row."""
    folder = Path(sys.argv[1])
    lines = []
    for number, case in enumerate(CASES):
        file = folder / f"{number:03}.json"
        if not file.exists():
            sys.stderr.write(f"no row for {case}: its test did not run or did not pass\n")
            return 1
        row = json.loads(file.read_text())
        lines.append(
            f"| {case.who} | {case.phase} | {case.transport} | {case.tp_size} | {row['result']} | "
            f"{row['seconds']:.1f} | pass |\n"
        )
    (HERE / "faults.md").write_text(HEAD + "".join(lines))
    sys.stdout.write(f"docs/faults.md: {len(lines)} cases\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
