"""Writes the table of numbers in README.md from the result files in `benchmarks/results/`.

    python benchmarks/readme_table.py            rewrite the table
    python benchmarks/readme_table.py --check    exit with 1 if the README is not what the files say

A result file is JSON with at least `benchmark`, `device`, `commit` and `headline`: a list of rows with `what`,
`measured`, `floor` (what the machine allows), `ratio` (measured over floor), `target` and `peer` (what the usual way
takes), all of them text as it is to be read, and `met`, whether the target was met.

Everything else in a file (configuration, percentiles, raw numbers) is for those who look closer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- numbers: begin (made by benchmarks/readme_table.py) -->"
END = "<!-- numbers: end -->"
COLUMNS = {
    "what": "what",
    "measured": "measured",
    "floor": "floor",
    "ratio": "of the floor",
    "target": "target",
    "peer": "usual way",
}
NO_RESULTS = "No result files yet: run `rollout bench --help`."


def table(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown between the markers."""
    if not results:
        return NO_RESULTS
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|---|--:|--:|--:|---|---|"]
    for result in results:
        for row in result["headline"]:
            cells = {**row, "target": verdict(row)}
            lines.append(f"| {' | '.join(str(cells.get(column, '')) for column in COLUMNS)} |")
    sources = [
        f"`{result['benchmark']}` at {short(result['commit'])} on {result['device']}"
        for result in results
    ]
    return "\n".join([*lines, "", f"Measured: {'; '.join(sources)}."])


def verdict(row: dict[str, Any]) -> str:
    """The target of a row, and whether it was met; empty: there is none."""
    if row.get("met") is None:
        return ""
    return f"{row['target']}" if row["met"] else f"**{row['target']}: missed**"


def short(commit: str) -> str:
    """Ten digits of a commit, with "-dirty" where files differed from it."""
    digits, dash, dirty = commit.partition("-")
    return f"{digits[:10]}{dash}{dirty}"


def rewritten(readme: str, results: Sequence[dict[str, Any]]) -> str:
    """The README with the table of `results` between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected the markers {BEGIN!r} and {END!r}, once each")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All result files of a folder, GPUs first, by name; one that lacks a key is an error that names it."""
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = {"benchmark", "device", "commit", "headline"} - result.keys()
        if missing:
            raise SystemExit(f"{path}: lacks {', '.join(sorted(missing))}")
        results.append(result)
    return sorted(results, key=lambda result: "CPU" in result["device"])


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check README.md; returns the exit code."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = rewritten(old, read_results(ROOT / "benchmarks" / "results"))
    if "--check" in arguments:
        if new != old:
            print(
                "README.md differs from benchmarks/results: run python benchmarks/readme_table.py"
            )
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
