"""`rollout` teaches, answers at once, and says what was probably meant."""

import os
import subprocess
import sys

import pytest

COMMANDS = ("demo", "experts", "generate", "bench", "info", "serve", "tiny", "top", "version")


def rollout(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rollout.cli", *arguments],
        env={**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_help_lists_every_command_with_examples():
    result = rollout("--help")
    assert result.returncode == 0
    assert "Examples" in result.stdout
    assert "Not available" not in result.stdout
    assert [name for name in COMMANDS if name not in result.stdout] == []


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(arguments):
    result = rollout(*arguments, PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0, result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in loaded
    assert loaded & {"torch", "transformers", "numpy", "matplotlib", "zmq"} == set()


@pytest.mark.parametrize("name", ["demo", "generate", "info", "serve", "tiny", "top"])
def test_the_help_of_a_command_has_examples(name):
    assert f"rollout {name} " in rollout(name, "--help").stdout


def test_an_unknown_command_names_the_nearest_one():
    result = rollout("generte")
    assert result.returncode == 2
    assert "generate" in result.stderr


def test_an_unknown_option_names_the_nearest_one():
    result = rollout("generate", "--temprature", "1", "hello")
    assert result.returncode == 2
    assert "--temperature" in result.stderr


@pytest.mark.parametrize(
    ("command", "section", "wrong", "right"),
    [
        ("generate", "engine", "max_runing_requests", "max_running_requests"),
        ("demo", "grpo", "stepz", "steps"),
    ],
)
def test_an_unknown_setting_is_one_line_that_names_the_nearest_one(
    command, section, wrong, right, tmp_path
):
    config = tmp_path / "my.toml"
    config.write_text(f"[{section}]\n{wrong} = 4\n")
    result = rollout(command, "--config", str(config))
    assert result.returncode == 1
    assert f"{config}: unknown key '{section}.{wrong}'" in result.stderr
    assert f"did you mean '{section}.{right}'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_traceback_of_an_error_is_there_when_asked_for():
    result = rollout("generate", "--set", "nonsense=1", ROLLOUT_DEBUG="1")
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("arguments", [["generate", "hello"], ["serve"]])
def test_a_model_that_is_not_named_is_asked_for_in_the_command_lines_words(arguments):
    result = rollout(*arguments)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert "--model FOLDER" in result.stderr and "rollout tiny" in result.stderr
