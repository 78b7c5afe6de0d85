"""The wheel holds the tracked files of our packages, no more and no less, and works on its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

#: Import names that must come from the wheel, not from the checkout.
IMPORT_ALL = """
import json, rollout, rollout_benchmarks, rollout_kernels, trainers_integration, weight_sync
packages = (rollout, rollout_benchmarks, rollout_kernels, trainers_integration, weight_sync)
print(json.dumps({package.__name__: list(package.__path__) for package in packages}))
"""

BUILD_TINY_MODEL = """
import torch, transformers
config = transformers.Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16,
)
model = transformers.Qwen3ForCausalLM(config)
print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""


def run(command, cwd, **variables) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def tracked_files(checkout: Path) -> list[str]:
    """What git tracks and is there; without git (an unpacked archive), every file that is no by-product."""
    if (checkout / ".git").exists():
        names = run(["git", "ls-files", "-z"], checkout).split("\0")
    else:
        names = [
            str(p.relative_to(checkout)) for p in checkout.rglob("*") if ".venv" not in p.parts
        ]
    by_products = ("__pycache__", ".egg-info")
    return [
        name
        for name in names
        if name and not any(b in name for b in by_products) and (checkout / name).is_file()
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, checkout) -> Path:
    """Built from a copy of the tracked files: a build in the checkout would see its leftovers."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked_files(checkout):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, "."], source)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory, wheel) -> Path:
    """An environment with the wheel installed; third parties are those of the running one."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    run([*pip, "--no-deps", "--no-index", wheel], folder.parent)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A plain path in a .pth file makes third parties importable without reading the .pth files there,
    # so an editable install of this project stays out.
    outer = sysconfig.get_paths()["purelib"]
    (site_packages / "third_parties.pth").write_text(f"{outer}\n")
    return python


def test_the_wheel_holds_the_tracked_files_of_the_packages(wheel, checkout, packages):
    expected = set()
    for name in tracked_files(checkout):
        if name.startswith("benchmarks/results/"):
            continue  # What was measured on some machine is for readers of the repository.
        for package, folder in packages.items():
            if name.startswith(f"{folder}/"):
                expected.add(f"{package}/{name.removeprefix(f'{folder}/')}")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, extra = sorted(expected - held), sorted(held - expected)
    assert not missing, f"not in the wheel: {missing}; list their packages in pyproject.toml"
    assert not extra, f"in the wheel but not tracked: {extra}"


def test_every_package_tells_type_checkers_that_it_is_typed(wheel, packages):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {f"{package}/py.typed" for package in packages} <= held


def test_the_wheel_carries_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert "Apache License" in archive.read(name).decode()
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_all_four_packages_import_from_another_folder(bare_python, tmp_path, packages):
    homes = json.loads(run([bare_python, "-c", IMPORT_ALL], tmp_path))
    environment = str(bare_python.parent.parent)
    assert set(homes) == set(packages)
    assert all(path.startswith(environment) for paths in homes.values() for path in paths), homes


def test_every_module_of_the_wheel_imports(bare_python, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in names
        if not name.endswith("__main__.py")
    )
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    run([bare_python, "-c", code], tmp_path)


def test_the_installed_console_command_teaches(bare_python, tmp_path):
    script = bare_python.with_name("rollout")
    text = run([script, "--help"], tmp_path, COLUMNS="120")
    assert "Examples" in text
    assert "rollout demo" in text
    assert json.loads(run([script, "version", "--json"], tmp_path))["rollout-sync"]


def test_transformers_builds_a_model_with_the_checkout_as_working_directory(bare_python, checkout):
    # There `import kernels` finds our folder, which must not look like the distribution of that name.
    shape = run([bare_python, "-c", BUILD_TINY_MODEL], checkout, HF_HUB_OFFLINE="1")
    assert shape.strip() == "(1, 3, 64)"


def test_an_installed_distribution_called_kernels_wins_over_our_folder(checkout, tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("owner = 'another distribution'\n")
    code = "import kernels; print(kernels.owner)"
    # With -c the working directory comes first on the path, before the other distribution.
    assert "another" in run([sys.executable, "-c", code], checkout, PYTHONPATH=str(tmp_path))
