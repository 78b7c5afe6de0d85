"""Writes `docs/faults.md` from what a run of the fault tests left in a folder: `python docs/write_faults.py FOLDER`.

`make faults` runs the tests and this. A case that did not pass leaves no entry, and then nothing is written.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "faults"))

from fault_matrix import (  # noqa: E402
    ALL_LIES,
    CASES,
    DEATHS,
    PHASES,
    PROMPTLY_S,
    RESULTS,
    SECTIONS,
    Case,
)

HEAD = """# Faults

What happens when a process dies (`kill -9`) or lies in the middle of a weight update, as seen by tests with real
processes (`tests/faults`). A process can be stopped exactly at the named phase, and is killed there.

| phase | where everything is at that moment |
|---|---|
| idle | no update is under way, a trainer's arena may be open |
| generating | a request is running, no update is under way |
| begin | the rank has got the message and has not opened the session |
| stage | it has not received or checked the first bucket |
| stage, process_group, trainer killed | all ranks wait for bytes of the second bucket, which is announced |
| vote | it has not said yet that it can commit |
| commit | inside the pause: this rank's bytes are new, another rank's may not be, nothing is compared yet |

In all phases but idle a client generates throughout. Where an engine of two ranks is stopped for somebody else's death,
rank 1 is, so that rank 0 is ahead of it.

**Checked after each death.** Whoever serves, serves one version, whole: the fingerprint of the resident bytes, and
greedy tokens and log-probabilities against transformers, on all ranks and replicas; every token that a client got was
computed by the version that its span names. Nobody waits longer than {promptly:.0f} s for an answer, which is far
below the deadlines in use; a new replica serves when it has started. No process is left, no memory file of an arena,
no shared segment, no socket file, and no descriptor more than before.

An entry says what happened, and after how many seconds, counted from the fault, the next version served or nobody
waited any more, on the machine of that run, which does other things at the same time. `·` is not a case. `make faults`
writes this file, and a test compares it with the list of cases.

| entry | what happened |
|---|---|
"""

LIES = """
## Lies and errors

Nobody dies here, but somebody lies, fails, is late, or has a damaged folder. The error is what the liar gets, or
whoever is lied to.

| who | phase | transport | engine | what happens | seconds |
|---|---|---|---|---|--:|
"""


def grid(cases: Iterable[Case], rows: Mapping[Case, Mapping[str, float | str]]) -> list[str]:
    """Lines of a table: who, over what, of which engine; a column for each phase."""
    cases = list(cases)
    lines = [
        f"| who | transport | engine | {' | '.join(PHASES)} |\n",
        f"|---|---|---|{'---|' * len(PHASES)}\n",
    ]
    for who, transport, engine in dict.fromkeys((c.who, c.transport, c.engine) for c in cases):
        cells = []
        for phase in PHASES:
            case = Case(who=who, phase=phase, transport=transport, engine=engine)
            row = rows[case] if case in cases else None
            cells.append("·" if row is None else f"{row['result']}: {row['seconds']:.1f}")
        lines.append(f"| {who} | {transport} | {engine} | {' | '.join(cells)} |\n")
    return lines


def document(rows: Mapping[Case, Mapping[str, float | str]]) -> str:
    """The whole text; `rows` has an entry for every case."""
    lines = [HEAD.format(promptly=PROMPTLY_S)]
    lines += [f"| {name} | {meaning} |\n" for name, meaning in RESULTS.items()]
    for title, introduction, executors in SECTIONS:
        chosen = [case for case in DEATHS if case.executor in executors]
        lines += [f"\n## {title}\n\n{textwrap.fill(introduction, 118)}\n\n", *grid(chosen, rows)]
    lines.append(LIES)
    for case in ALL_LIES:
        row = rows[case]
        lines.append(
            f"| {case.who} | {case.phase} | {case.transport} | {case.engine} | {row['result']} | "
            f"{row['seconds']:.1f} |\n"
        )
    return "".join(lines)


def documented(text: str) -> list[Case]:
    """The cases that a text of `document` has entries for, in its order."""
    found: list[Case] = []
    for line in text.splitlines():
        cells: Sequence[str] = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 + len(PHASES) and "---" not in cells:
            for phase, cell in zip(PHASES, cells[3:], strict=True):
                if cell.rpartition(":")[0] in RESULTS:
                    who, transport, engine = cells[:3]
                    found.append(Case(who=who, phase=phase, transport=transport, engine=engine))
        elif len(cells) == 6 and cells[1] in PHASES:
            who, phase, transport, engine = cells[:4]
            found.append(Case(who=who, phase=phase, transport=transport, engine=engine))
    return found


def main() -> int:
    """Returns the exit code: 1 when a case has no entry."""
    folder = Path(sys.argv[1])
    rows = {}
    for number, case in enumerate(CASES):
        file = folder / f"{number:03}.json"
        if not file.exists():
            sys.stderr.write(f"no row for {case}: its test did not run or did not pass\n")
            return 1
        rows[case] = json.loads(file.read_text())
    (HERE / "faults.md").write_text(document(rows))
    sys.stdout.write(f"docs/faults.md: {len(rows)} cases\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
