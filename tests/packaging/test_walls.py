"""The rooms inside a package: imports between them go one way, and nothing imports in circles, lazily or not."""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict

import pytest

#: The rooms of `weight_sync`, in the order in which they may import: only from earlier lines and their own.
WEIGHT_SYNC = [
    ["errors", "report", "time_left"],
    ["devices"],
    ["layout"],
    ["wire", "process_groups"],
    ["transports"],
    ["joint"],
    ["publisher", "foreign"],
    ["plan", "spmd"],
    ["staging"],
    ["receiver"],
]
#: Rooms on one line that do not know each other at all.
STRANGERS = [
    *(("wire", "process_groups"), ("publisher", "foreign")),
    *(("spmd", "plan"), ("spmd", "staging"), ("spmd", "receiver")),
]
#: Inside `rollout.engine`: the surface that users import stands on the executors, those on the loop.
ENGINE = [["loop"], ["executors"], [""]]

#: What a trainer's process does first, and what of ours it must not load by that: the engine's half of everything.
TRAINERS = (
    "import weight_sync.publisher.publisher",
    "import weight_sync; weight_sync.WeightPublisher",
    "import weight_sync.spmd.publisher",
    "import weight_sync; weight_sync.update_weights",
)
ENGINES_HALF = (
    "rollout",
    *("weight_sync.plan", "weight_sync.staging", "weight_sync.receiver"),
    *("weight_sync.process_groups.receiving_process", "weight_sync.process_groups.receiving_child"),
    *("weight_sync.process_groups.expected", "weight_sync.process_groups.last_reads"),
    "weight_sync.process_groups.children",
)


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


def of_the_engines_half(module):
    return any(module == name or module.startswith(f"{name}.") for name in ENGINES_HALF)


@pytest.mark.parametrize("statement", TRAINERS)
def test_a_trainers_process_loads_the_trainers_half_alone(statement):
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
        ).stdout
    )
    assert "weight_sync.publisher.endpoint" in loaded
    assert [module for module in loaded if of_the_engines_half(module)] == []


def test_the_engines_half_is_where_that_test_looks_for_it(sources):
    modules = {source.module for source in sources}
    assert [name for name in ENGINES_HALF if name not in modules] == []
    engines_end = re.compile(r"Opened\w*Arena|\w+Stage|JoinedGroup|ReceivingProcess|Plan|Replay")
    homes = {
        source.module
        for source in sources
        if source.module.startswith("weight_sync.")
        for node in source.tree.body
        if isinstance(node, ast.ClassDef) and engines_end.fullmatch(node.name)
    }
    assert len(homes) > 8 and [module for module in homes if not of_the_engines_half(module)] == []
