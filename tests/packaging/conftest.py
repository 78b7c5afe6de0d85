"""The project's source files as syntax trees."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

#: Import name -> folder in the checkout.
PACKAGES = {
    "rollout": "rollout",
    "weight_sync": "weight_sync",
    "trainers_integration": "trainers_integration",
    "rollout_benchmarks": "benchmarks",
    "rollout_kernels": "kernels",
}


@dataclass(frozen=True)
class Source:
    """One Python file of our packages."""

    path: Path
    """Relative to the checkout."""
    module: str
    """Its import name, for example `rollout.cli.app`; a package is named after its folder."""
    tree: ast.Module
    num_lines: int

    @property
    def package(self) -> str:
        """The package that a relative import of one dot starts from."""
        is_package = self.path.name == "__init__.py"
        return self.module if is_package else self.module.rpartition(".")[0]


def read_source(path: Path, module: str) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(
        path=path.relative_to(CHECKOUT),
        module=module,
        tree=ast.parse(text, str(path)),
        num_lines=len(text.splitlines()),
    )


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


@pytest.fixture(scope="session")
def packages() -> dict[str, str]:
    return PACKAGES


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every Python file of our packages, in the order of their names."""
    found = []
    for name, folder in PACKAGES.items():
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            parts = path.relative_to(CHECKOUT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(read_source(path, ".".join((name, *parts))))
    assert found
    return found


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint) -> Path:
    """An ordinary Hugging Face folder with a tied model, for commands that need one."""
    return tiny_checkpoint("qwen3", head_dim=16, tie_word_embeddings=True)
