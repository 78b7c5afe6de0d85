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


def test_each_page_of_a_trainer_has_a_script_the_lines_that_change_and_versions(checkout):
    """A page without one of them leaves its reader to guess; what a page of models is about is no trainer."""
    for page in sorted((checkout / "docs" / "trainers").glob("*.md")):
        if page.stem == "reward_models":
            continue
        text = page.read_text()
        scripts = re.findall(r"(?:python |\.\./\.\./)(examples/[\w./-]+\.py)", text)
        assert scripts or "`rollout demo" in text, page.name
        assert all((checkout / script).is_file() for script in scripts), page.name
        assert "```diff" in text, page.name
        _, found, versions = text.partition("## Versions tried")
        assert found and re.search(r"^\|.*\d+\.\d+", versions, re.MULTILINE), page.name


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
