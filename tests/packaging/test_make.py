"""What the make targets would do, without doing it."""

import os
import subprocess

import pytest


@pytest.fixture
def make(checkout, tmp_path):
    def dry_run(*arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        result = subprocess.run(
            ["make", "-n", f"VENV={tmp_path / 'venv'}", *arguments],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return dry_run


@pytest.mark.parametrize("target", ["venv", "demo", "test"])
def test_without_a_gpu_a_fixed_torch_is_installed_before_anything_else(make, target):
    installs = [line for line in make(target, "HAS_GPU=").splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert installs[0].endswith('install -q "torch==2.13.0"')
    assert installs[1].endswith('install -q -e ".[test,demo,ray,server,trl,lm-eval]"')


def test_with_a_gpu_torch_comes_from_the_supported_range(make):
    assert 'install -q "torch>=2.11,<2.14"' in make("venv", "HAS_GPU=yes")


def test_nothing_is_made_again_while_the_project_file_is_older(make, tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").touch()
    (tmp_path / "venv" / ".installed").touch()
    assert "pip" not in make("venv")
    assert "pip" not in make("demo")


def test_minutes_of_load_are_left_out_and_what_needs_a_gpu_or_a_browser_without_one(make):
    assert '-m "not load and not gpu"' in make("test", "HAS_GPU=", "HAS_BROWSER=yes")
    both = '-m "not load and not gpu and not browser"'
    assert both in make("test", "HAS_GPU=", "HAS_BROWSER=")
    assert '-m "not load and not browser"' in make("test", "HAS_GPU=yes", "HAS_BROWSER=")
    assert '-m "not load"' in make("test", "HAS_GPU=yes", "HAS_BROWSER=yes")


def test_what_is_left_out_for_want_of_a_browser_is_said(make):
    assert "no chromium here" in make("test", "HAS_BROWSER=")
    assert "no chromium here" not in make("test", "HAS_BROWSER=yes")


def test_the_tests_come_after_lint_and_types(make):
    text = make("test")
    steps = ["ruff check", "ruff format --check", "mypy", "-m pytest"]
    assert sorted(steps, key=text.index) == steps


def test_continuous_integration_calls_make_test_and_nothing_else(checkout):
    script = checkout / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    assert commands == ["set -e", 'cd "$(dirname "$0")/.."', "make test"]
    assert os.access(script, os.X_OK)


def test_the_files_that_come_first_are_there(checkout, pytestconfig):
    (plugin,) = (p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "STARTED_ANEW"))
    stems = {path.stem for path in (checkout / "tests").rglob("test_*.py")}
    assert set(plugin.LONG) | plugin.STARTED_ANEW <= stems
    with_ray = {"test_ray", "test_ray_deaths", "test_examples_openrlhf"}
    assert len(with_ray & set(plugin.LONG)) == 1
