"""No code of ours can execute what somebody sent: promise 3, as far as a look at the source can hold it."""

import ast

#: Modules that turn bytes into arbitrary objects, or whose queues and connections do.
EXECUTING = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "multiprocessing"}
#: Functions elsewhere that unpickle, or run text.
EXECUTING_CALLS = {
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("recv_object_list", "send_object_list", "recv_pyobj", "send_pyobj", "eval", "exec"),
}


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    return []


def test_no_module_imports_something_that_executes_what_it_reads(sources):
    found = [
        f"{source.path}:{node.lineno} {name}"
        for source in sources
        for node in ast.walk(source.tree)
        for name in names_of(node)
        if name in EXECUTING
    ]
    assert found == []


def test_no_module_calls_something_that_unpickles_or_runs_text(sources):
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            method = isinstance(function, ast.Attribute)
            name = function.attr if method else getattr(function, "id", "")
            # `model.eval()` is a method; the built-in is not.
            if name in EXECUTING_CALLS and not (method and name in ("eval", "exec")):
                found.append(f"{source.path}:{node.lineno} {name}")
            if name == "load" and ast.unparse(function) in ("torch.load", "np.load", "numpy.load"):
                found.append(f"{source.path}:{node.lineno} {ast.unparse(function)}")
    assert found == []
