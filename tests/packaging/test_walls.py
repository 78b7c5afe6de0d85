"""The rooms inside a package: imports between them go one way, and nothing imports in circles, lazily or not."""

import ast
import json
import subprocess
import sys
from collections import defaultdict

import pytest

#: The rooms of `weight_sync`, in the order in which they may import: only from earlier lines and their own.
WEIGHT_SYNC = [
    ["errors", "report"],
    ["devices"],
    ["layout"],
    ["wire", "plan", "process_groups"],
    ["transports"],
    ["joint"],
    ["publisher", "foreign"],
    ["receiver", "spmd"],
]
#: Rooms on one line that do not know each other at all.
STRANGERS = [("wire", "process_groups"), ("receiver", "spmd"), ("publisher", "foreign")]
#: Inside `rollout.engine`: the surface that users import stands on the executors, those on the loop.
ENGINE = [["loop"], ["executors"], [""]]

#: Modules whose import stands for a trainer's process, and what they must not bring with them.
TRAINERS = ("weight_sync.publisher.publisher", "weight_sync.spmd.publisher")


def edges(sources, package):
    """(importing module, imported module) for every import between modules of `package`."""
    known = {source.module for source in sources}
    found = set()
    for source in sources:
        if source.module.partition(".")[0] != package:
            continue
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = node.module or ""
            if node.level:
                parts = source.package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for name in [f"{base}.{alias.name}" for alias in node.names]:
                target = name if name in known else base
                if target in known and target.partition(".")[0] == package:
                    found.add((source.module, target))
    # The package itself hands out names of all its modules, when they are asked for.
    return {(a, b) for a, b in found if package not in (a, b) and a != b}


def room_level(order, prefix, module):
    inner = module.removeprefix(f"{prefix}.")
    room = inner.partition(".")[0]
    for level, names in enumerate(order):
        if room in names:
            return level
    assert order[-1] == [""], f"{module} has no room"
    return len(order) - 1


@pytest.mark.parametrize(
    ("prefix", "order"), [("weight_sync", WEIGHT_SYNC), ("rollout.engine", ENGINE)]
)
def test_imports_between_rooms_go_one_way(sources, prefix, order):
    inside = [
        (a, b)
        for a, b in edges(sources, prefix.partition(".")[0])
        if a.startswith(f"{prefix}.") and b.startswith(f"{prefix}.")
    ]
    wrong = [
        f"{a} imports {b}"
        for a, b in sorted(inside)
        if room_level(order, prefix, b) > room_level(order, prefix, a)
    ]
    assert inside and wrong == []


def test_rooms_that_should_not_know_each_other_do_not(sources):
    wrong = [
        f"{a} imports {b}"
        for a, b in sorted(edges(sources, "weight_sync"))
        for pair in STRANGERS
        if {a.split(".")[1], b.split(".")[1]} == set(pair)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "package", ["weight_sync", "rollout", "rollout_kernels", "trainers_integration"]
)
def test_no_modules_import_each_other_in_a_circle(sources, package):
    graph = defaultdict(set)
    for a, b in edges(sources, package):
        graph[a].add(b)
    assert circles(graph) == []


def circles(graph):
    """Strongly connected components of more than one module (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_the_search_for_circles_finds_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("module", TRAINERS)
def test_a_trainers_process_loads_the_trainers_half_alone(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
        ).stdout
    )
    engines_half = [name for name in loaded if name.startswith("weight_sync.receiver")]
    assert engines_half == []
    assert not any(name.split(".")[0] == "rollout" for name in loaded)
