"""What docs/names.md names exists here, and what it calls the same bears the name that it has there."""

import ast
import re

import pytest


@pytest.fixture(scope="module")
def rows(checkout):
    """(what is there, what is here) of every table."""
    lines = (checkout / "docs/names.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]
    found = [tuple(map(str.strip, pair)) for pair in cells if pair[0].strip() != "there"]
    assert len(found) > 30 and all(len(pair) == 2 for pair in found)
    return found


@pytest.fixture(scope="module")
def defined(sources):
    """Every name that our code defines: modules, classes, functions, and what they assign."""
    names = set()
    for source in sources:
        names.update(source.module.split("."))
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def unknown(names, defined):
    """Those of which a part is defined nowhere; calls and options count by the name before them."""
    return [name for name in names if not {*name.split("(")[0].split(".")} <= defined]


def test_what_took_the_place_of_a_name_exists(rows, defined, checkout):
    files = [name for _, here in rows for name in quoted(here) if "/" in name or ".py" in name]
    lost = [
        name
        for name in files
        if not (checkout / name).exists() and not [*checkout.glob(f"rollout/*/{name}")]
    ]
    assert len(files) > 10 and lost == []
    names = [
        name
        for _, here in rows
        if not here.startswith("not ")
        for name in quoted(here)
        if name not in files and name != "async_"
    ]
    assert len(names) > 20 and unknown(names, defined) == []


def test_what_is_the_same_here_bears_its_name(rows, defined):
    names = [name for there, here in rows if here.startswith("the same") for name in quoted(there)]
    assert len(names) > 30 and unknown(names, defined) == []
