"""Writes the tables of numbers in README.md, one for each device, from the result files in `benchmarks/results/`.

    python benchmarks/readme_table.py            rewrite the tables
    python benchmarks/readme_table.py --check    exit with 1 if the README is not what the files say

A result file is JSON with at least `benchmark`, `device`, `commit` and `headline`: a list of rows with `what`,
`measured`, `floor` (what the machine allows), `ratio` (measured over floor), `target` and `peer` (what the usual way
takes), all of them text as it is to be read, and `met`, whether the target was met. A table has those columns that
one of its rows fills.

Everything else in a file (configuration, percentiles, raw numbers) is for those who look closer.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
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
RIGHT = ("measured", "floor", "ratio")
NO_RESULTS = "No result files yet: run `rollout bench --help`."
NUMBERS = dict(enumerate("One Two Three Four Five Six Seven Eight".split(), 1))


def tables(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown between the markers: a heading, a table and its sources for each device."""
    if not results:
        return NO_RESULTS
    devices = dict.fromkeys(result["device"] for result in results)
    return "\n\n".join(
        "\n".join(_group(device, [r for r in results if r["device"] == device]))
        for device in devices
    )


def _group(device: str, results: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = [{**row, "target": verdict(row)} for result in results for row in result["headline"]]
    columns = [c for c in COLUMNS if c == "what" or any(row.get(c, "") for row in rows)]
    yield f"### {heading(device)}"
    yield ""
    yield f"| {' | '.join(COLUMNS[column] for column in columns)} |"
    yield f"|{'|'.join('--:' if column in RIGHT else '---' for column in columns)}|"
    for row in rows:
        yield f"| {' | '.join(str(row.get(column, '')) for column in columns)} |"
    sources = dict.fromkeys(f"`{r['benchmark']}` at {short(r['commit'])}" for r in results)
    yield ""
    yield f"Measured on {device}: {', '.join(sources)}."


def heading(device: str) -> str:
    """A device as people say it: "Two H200s" for "2 x NVIDIA H200"."""
    cores = re.fullmatch(r"(.+), (\d+) CPUs", device)
    if cores:
        return f"{_many(int(cores[2]), 'CPU core')}, {cores[1]}"
    num, name = _gpus(device)
    return _many(num, name.removeprefix("NVIDIA "))


def _gpus(device: str) -> tuple[int, str]:
    """How many, and of which name."""
    several = re.fullmatch(r"(\d+) x (.+)", device)
    return (int(several[1]), several[2]) if several else (1, device)


def _many(num: int, name: str) -> str:
    return f"{NUMBERS.get(num, num)} {name}{'' if num == 1 else 's'}"


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
    """The README with the tables of `results` between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected the markers {BEGIN!r} and {END!r}, once each")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(results)}\n{END}{after}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All result files of a folder: one GPU, several, CPUs; one that lacks a key is an error that names it."""
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = {"benchmark", "device", "commit", "headline"} - result.keys()
        if missing:
            raise SystemExit(f"{path}: lacks {', '.join(sorted(missing))}")
        results.append(result)

    def place(result: dict[str, Any]) -> tuple[bool, int]:
        return "cpu" in result["device"].lower(), _gpus(result["device"])[0]

    return sorted(results, key=place)


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
