"""Rules of size and naming that keep the code readable."""

import ast

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
#: A kernel is one function to its compiler, its signature alone takes twenty lines, and its state does not pass walls.
MAX_KERNEL_LINES = 150


def test_no_file_is_longer_than_it_may_be(sources, checkout):
    lengths = {str(source.path): source.num_lines for source in sources}
    for folder in ("tests", "benchmarks", "examples"):
        for path in (checkout / folder).rglob("*.py"):
            lengths[str(path.relative_to(checkout))] = len(path.read_text().splitlines())
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_it_may_be(sources):
    long = [
        f"{source.path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > limit_of(node)
    ]
    assert long == []


def limit_of(node):
    is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES


def test_every_module_says_what_it_is_for(sources):
    silent = [str(source.path) for source in sources if not ast.get_docstring(source.tree)]
    assert silent == []


def test_no_module_is_called_utils(sources):
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert [s.path for s in sources if vague & set(s.module.split("."))] == []


def test_the_kernels_folder_is_no_package_so_that_it_shadows_no_other(checkout):
    # `kernels` is another distribution's import name, one that transformers looks for.
    assert not (checkout / "kernels" / "__init__.py").exists()


def test_test_folders_are_no_packages(checkout):
    assert [str(path) for path in (checkout / "tests").rglob("__init__.py")] == []


def test_test_files_stand_in_one_of_the_groups(checkout):
    groups = {"parity", "sync", "faults", "engine", "kernels", "server", "trainers", "packaging"}
    strays = [
        str(path.relative_to(checkout))
        for path in (checkout / "tests").rglob("test_*.py")
        if path.relative_to(checkout / "tests").parts[0] not in groups
    ]
    assert strays == []
