"""What the README shows works, and its numbers are those of the result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def readme(checkout) -> str:
    return (checkout / "README.md").read_text()


def test_the_numbers_are_those_of_the_result_files(checkout):
    script = checkout / "benchmarks" / "readme_table.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_file_that_the_documents_name_is_there(checkout):
    for document in [checkout / "README.md", *sorted((checkout / "docs").glob("*.md"))]:
        text = document.read_text()
        paths = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|toml|md))`", text)
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        missing = [path for path in paths if not exists(checkout, path)]
        missing += [link for link in links if not (document.parent / link).exists()]
        assert missing == [], document.name


def exists(checkout: Path, path: str) -> bool:
    """A path from the checkout, or from inside `rollout/` as the architecture document writes it."""
    return (checkout / path).is_file() or (checkout / "rollout" / path).is_file()


def test_the_example_is_short(readme):
    assert len(example(readme).splitlines()) <= 25


def example(readme: str) -> str:
    (code,) = re.findall(r"<!-- example: begin -->\n```python\n(.*?)```", readme, re.DOTALL)
    return code


def test_the_example_runs_as_it_stands(readme, tmp_path, checkpoint):
    code = example(readme)
    assert code.count('"path/to/checkpoint"') == 1
    script = tmp_path / "trainer.py"
    script.write_text(code.replace('"path/to/checkpoint"', repr(str(checkpoint))))
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=200
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "ms pause" in line]
    assert [line.split()[:2] for line in lines] == [["0", "1"], ["1", "2"], ["2", "3"]]
