"""Imports go one way; the tables here are those of docs/architecture.md.

Imports count wherever they stand, inside functions and under `TYPE_CHECKING` too: what a module knows of
others is what is limited here. Only the tests about laziness look at where an import stands.
"""

import ast
import sys
from dataclasses import dataclass

#: Package -> packages of ours that it may import, and third parties.
OURS = {
    "rollout_kernels": set(),
    "weight_sync": {"rollout_kernels"},
    "rollout": {"weight_sync", "rollout_kernels"},
    "trainers_integration": {"weight_sync", "rollout", "rollout_kernels"},
    "rollout_benchmarks": {"weight_sync", "rollout", "rollout_kernels"},
}
THIRD_PARTIES = {
    "rollout_kernels": {"torch", "triton"},
    "weight_sync": {"torch", "numpy", "zmq", "msgspec", "safetensors"},
    "rollout": {
        *("torch", "transformers", "tokenizers", "safetensors", "zmq", "msgspec", "numpy"),
        *("typer", "rich", "matplotlib"),
        *("fastapi", "uvicorn", "starlette", "httpx", "prometheus_client", "ray"),
    },
    "trainers_integration": {
        *("torch", "transformers", "tokenizers", "safetensors", "msgspec", "numpy"),
        *("typer", "rich", "matplotlib"),
        *("trl", "verl", "openrlhf", "ray", "accelerate", "datasets", "peft"),
    },
    "rollout_benchmarks": {
        *("torch", "transformers", "safetensors", "zmq", "msgspec", "numpy"),
        *("typer", "rich", "psutil", "matplotlib"),
    },
}

#: The parts of `rollout`, in the order in which they may import: only from earlier lines and their own.
ORDER = [
    ["types", "config", "errors", "hints", "sampling_params", "settings"],
    ["protocol", "tokenizer", "token_bounds", "detokenizer", "stop_strings"],
    ["scheduling", "cache"],
    ["layers"],
    ["models"],
    ["runner"],
    ["distributed"],
    ["engine"],
    ["pool"],
    ["server", "cli"],
]
#: `from rollout import RolloutPool` reaches the pool, so only what comes after it may say so.
FACADE_LEVEL = 8

#: Third parties that one part of `rollout` has for itself (`ray` only one module of it).
CONFINED = {
    "fastapi": ("rollout.server",),
    "uvicorn": ("rollout.server",),
    "starlette": ("rollout.server",),
    "httpx": ("rollout.server",),
    "prometheus_client": ("rollout.server",),
    "typer": ("rollout.cli",),
    "matplotlib": ("rollout.cli",),
    "tokenizers": ("rollout.cli.tiny",),
    "transformers": ("rollout.models", "rollout.engine", "rollout.tokenizer", "rollout.cli"),
}
PURE_PYTHON = ("rollout.scheduling", "rollout.cache")

#: What `trainers_integration` may see of `rollout`: names of the package itself, and these modules.
PUBLIC_MODULES = {"rollout", "rollout.settings", "rollout.errors", "rollout.config"}
#: For the modules behind their sub-commands alone: options whose defaults and help come from a settings class.
FOR_COMMANDS = "rollout.cli.options"

#: At most one of these per file, and only inside functions or classes' methods.
FRAMEWORKS = {"trl", "verl", "openrlhf", "ray", "accelerate"}


@dataclass(frozen=True)
class Import:
    """One imported module, as an absolute name, and where."""

    name: str
    where: str
    at_import_time: bool
    """It stands at the top level, outside `if TYPE_CHECKING:`."""

    @property
    def root(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """What `imports_of` needs of a file; the fixture's sources have more."""

    path: str
    module: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.module.rpartition(".")[0]


def imports_of(source) -> list[Import]:
    found = []

    def visit(node, lazy):
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            where = f"{source.path}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, where, not lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = absolute(source, child)
                # `from ..engine import core` and `from rollout import cli` may name modules.
                names = [f"{base}.{alias.name}" for alias in child.names]
                found.extend(Import(name, where, not lazy) for name in (base, *names))
            else:
                visit(child, lazy or is_function or for_types)

    visit(source.tree, False)
    return found


def absolute(source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module
    package = source.package.split(".")
    base = package[: len(package) - node.level + 1]
    assert base, f"{source.path}:{node.lineno} leaves its package"
    return ".".join([*base, *([node.module] if node.module else [])])


def package_of(source) -> str:
    return source.module.partition(".")[0]


def level_of(module: str) -> int | None:
    """The line of ORDER that a module of `rollout` belongs to; None: it is not one."""
    parts = module.split(".")
    if parts[0] != "rollout":
        return None
    if len(parts) == 1:
        return FACADE_LEVEL
    return next((level for level, names in enumerate(ORDER) if parts[1] in names), None)


def test_the_reader_of_imports_sees_every_form():
    lines = [
        "import torch.nn as nn",
        "from .. import config",
        "from ..engine.loop.core import EngineCore",
        "if TYPE_CHECKING:",
        "    import ray",
        "def late():",
        "    from rollout import Engine",
    ]
    tree = ast.parse("\n".join(lines))
    source = Source(path="app.py", module="rollout.cli.app", tree=tree)
    assert [(found.name, found.at_import_time) for found in imports_of(source)] == [
        ("torch.nn", True),
        ("rollout", True),
        ("rollout.config", True),
        ("rollout.engine.loop.core", True),
        ("rollout.engine.loop.core.EngineCore", True),
        ("ray", False),
        ("rollout", False),
        ("rollout.Engine", False),
    ]


def test_packages_import_one_another_only_in_the_written_direction(sources):
    wrong = [
        f"{found.where}: {package_of(source)} imports {found.name}"
        for source in sources
        for found in imports_of(source)
        if found.root in OURS
        and found.root != package_of(source)
        and found.root not in OURS[package_of(source)]
    ]
    assert wrong == []


def test_every_third_party_is_one_that_its_package_may_use(sources):
    wrong = [
        f"{found.where}: {package_of(source)} imports {found.name}"
        for source in sources
        for found in imports_of(source)
        if found.root not in OURS
        and found.root not in sys.stdlib_module_names
        and found.root not in THIRD_PARTIES[package_of(source)]
    ]
    assert wrong == []


def test_every_part_of_rollout_has_its_place_in_the_order(sources):
    unplaced = [
        str(source.path)
        for source in sources
        if package_of(source) == "rollout" and level_of(source.module) is None
    ]
    assert unplaced == []


def test_inside_rollout_imports_go_one_way(sources):
    wrong = []
    for source in sources:
        level = level_of(source.module)
        if level is None or source.module == "rollout":
            continue
        for found in imports_of(source):
            imported = level_of(found.name)
            if imported is not None and imported > level and found.name != "rollout":
                wrong.append(f"{found.where}: {source.module} imports {found.name}")
            if found.name == "rollout" and level < FACADE_LEVEL and not is_submodule(source, found):
                wrong.append(f"{found.where}: {source.module} imports the facade {found.name}")
    assert wrong == []


def is_submodule(source, found: Import) -> bool:
    """`from rollout import config` and `from .. import config` name modules, not the facade."""
    return any(
        other.where == found.where and other.name != "rollout" and level_of(other.name) is not None
        for other in imports_of(source)
    )


def test_the_parts_that_only_decide_import_no_tensors(sources):
    wrong = [
        f"{found.where}: {source.module} imports {found.name}"
        for source in sources
        if source.module.startswith(PURE_PYTHON)
        for found in imports_of(source)
        if found.root in {"torch", "numpy", "transformers", "zmq", "weight_sync", "rollout_kernels"}
    ]
    assert wrong == []


def test_heavy_third_parties_stay_in_the_part_that_needs_them(sources):
    wrong = [
        f"{found.where}: {source.module} imports {found.name}"
        for source in sources
        if package_of(source) == "rollout"
        for found in imports_of(source)
        if found.root in CONFINED and not source.module.startswith(CONFINED[found.root])
    ]
    assert wrong == []


def test_ray_is_known_to_one_module_of_the_engine(sources):
    users = {
        source.module
        for source in sources
        if package_of(source) == "rollout"
        for found in imports_of(source)
        if found.root == "ray"
    }
    assert len(users) <= 1, users


def test_trainers_use_only_public_names_of_the_engine(sources):
    wrong = []
    for source in sources:
        if package_of(source) != "trainers_integration":
            continue
        for found in imports_of(source):
            module = ".".join(found.name.split(".")[:2])
            private = level_of(module) is not None and module not in PUBLIC_MODULES
            if source.module.endswith(".command") and f"{found.name}.".startswith(
                f"{FOR_COMMANDS}."
            ):
                continue
            if found.root == "rollout" and private:
                wrong.append(f"{found.where}: {source.module} imports {found.name}")
    assert wrong == []


def test_a_file_for_trainers_knows_one_framework_and_imports_it_when_it_is_used(sources):
    wrong = []
    for source in sources:
        if package_of(source) != "trainers_integration":
            continue
        frameworks = [found for found in imports_of(source) if found.root in FRAMEWORKS]
        if len({found.root for found in frameworks}) > 1:
            wrong.append(f"{source.path}: {sorted({found.root for found in frameworks})}")
        wrong += [f"{found.where}: at import time" for found in frameworks if found.at_import_time]
    assert wrong == []


def test_what_is_optional_is_never_imported_with_its_package(sources):
    optional = {"triton", "ray", "fastapi", "uvicorn", "starlette", "matplotlib", "psutil"}
    wrong = [
        f"{found.where}: {source.module} imports {found.name}"
        for source in sources
        if not source.module.startswith("rollout.server")
        for found in imports_of(source)
        if found.root in optional and found.at_import_time and not guarded(source, found)
    ]
    assert wrong == []


def guarded(source, found: Import) -> bool:
    """Inside a `try:` that expects the module to be missing."""
    line = int(found.where.rpartition(":")[2])
    return any(
        isinstance(node, ast.Try)
        and node.lineno <= line <= node.end_lineno
        and any(
            "Import" in ast.unparse(h.type) or "NotFound" in ast.unparse(h.type)
            for h in node.handlers
            if h.type
        )
        for node in ast.walk(source.tree)
    )
