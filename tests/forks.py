"""Child processes as forks of one that has imported everything already: `Popen`, for commands that run this Python.

A Python that imports torch anew takes seconds of a processor before it does anything. A fork does the same a moment
later: it has the command line, environment, working folder and descriptors that were asked for, and nothing else; it is
a child of the process that asked, which can wait for it and see how it ended. What it cannot show is that a command
starts from nothing: tests of that use `subprocess.Popen` itself (see `conftest`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_SET_CHILD_SUBREAPER = 36
_MOST_BYTES = 1 << 20
_READY = b"ready"
TESTS = Path(__file__).resolve().parent
STARTED = (
    *("rollout.engine.executors.child", "rollout.server.__main__"),
    "weight_sync.process_groups.receiving_child",
)
"""Our modules whose processes may be forks."""
INTERPRETED = "TRITON_INTERPRET"
"""Triton reads it when it is imported."""
INTERPRETING = {INTERPRETED: "1", "OPENBLAS_CORETYPE": "Sandybridge"}
"""Of a process that interprets kernels. The interpreter's products are numpy's, and what OpenBLAS has for processors
with fused multiply-adds and without AVX-512 rounds a row by its place in a tile, as no kernel does."""


class Zygote:
    """The asking end of a process that forks; from any thread."""

    _reaping = threading.Lock()

    def __init__(self, *, fork: bool = False, interpreted: bool = False) -> None:
        """fork: from this process, which has one thread and has imported everything; else a new interpreter."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self._process: Any = None
        if fork:
            if os.fork() == 0:
                ours.close()
                serve(theirs)
        else:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            environment.pop(INTERPRETED, None)
            if interpreted:
                environment.update(INTERPRETING)
            command = [sys.executable, str(TESTS / "forks.py"), str(theirs.fileno())]
            self._process = Started(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._ready = False

    def wait(self) -> None:
        """Until it has imported everything."""
        with self._reaping:
            if not self._ready:
                assert self._socket.recv(64) == _READY, "the process to fork from has ended"
                self._ready = True

    def fork(self, request: Mapping[str, Any], fds: Sequence[int]) -> int:
        """Start a process; returns its id."""
        self.wait()
        with self._reaping:
            _become_reaper(True)
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
                return int(self._socket.recv(64))
            finally:
                _become_reaper(False)

    def close(self) -> None:
        """End it; its forks go on."""
        self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


Started = subprocess.Popen
"""Of a new interpreter."""


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen`, whose process is a fork of `zygote` where one is given and runs this Python.

    `prelude`: statements that run in it before all else.
    """

    def __init__(
        self, *args: Any, zygote: Zygote | None, prelude: str = "", **options: Any
    ) -> None:
        self._zygote, self._prelude = zygote, prelude
        super().__init__(*args, **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if self._zygote is None:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        (_, _, _, pass_fds, cwd, env, _, _, _, *pipes) = rest[:15]
        stdin, _, _, stdout, _, stderr = pipes
        standard = [fd if fd != -1 else i for i, fd in enumerate((stdin, stdout, stderr))]
        request = {
            "args": [os.fspath(arg) for arg in args[1:]],
            "env": dict(os.environ if env is None else env),
            "cwd": os.fspath(cwd or os.getcwd()),
            "fds": [0, 1, 2, *pass_fds],
            "prelude": self._prelude,
        }
        try:
            self.pid = self._zygote.fork(request, [*standard, *pass_fds])
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


# ---- which commands ----------------------------------------------------------------------------------------------


class Forking:
    """The zygotes of a test process, started when they are first needed."""

    def __init__(self) -> None:
        self._interpreted: Zygote | None = None
        self._lock = threading.Lock()
        self._plain: list[Zygote] = []
        self._turns: Iterator[Zygote] = iter(())

    def zygote(self, env: Mapping[str, str] | None) -> Zygote:
        """For a process with this environment."""
        with self._lock:
            if (os.environ if env is None else env).get(INTERPRETED) == "1":
                self._interpreted = self._interpreted or Zygote(interpreted=True)
                return self._interpreted
            if not self._plain:
                # Two, so that ranks of an engine differ in how they hash, as they do in life.
                self._plain = [Zygote(), Zygote()]
                for zygote in self._plain:  # no rank starts long before the next one
                    zygote.wait()
                self._turns = itertools.cycle(self._plain)
            return next(self._turns)

    def popen(self) -> type:
        """What `subprocess.Popen` may be meanwhile."""
        forking = self

        class Chosen(Popen):
            def __init__(self, *args: Any, **options: Any) -> None:
                forks = len(args) == 1 and _may_fork(args[0], options)
                zygote = forking.zygote(options.get("env")) if forks else None
                super().__init__(*args, zygote=zygote, **options)

        return Chosen

    def close(self) -> None:
        """End them."""
        for zygote in (*self._plain, self._interpreted):
            if zygote is not None:
                zygote.close()


def _may_fork(args: Any, options: Mapping[str, Any]) -> bool:
    """Whether a command runs this Python on a script of tests, on tests, or on one of our modules that may be forks."""
    if isinstance(args, (str, bytes, os.PathLike)) or os.fspath(args[0]) != sys.executable:
        return False
    if not options.keys() <= _KNOWN:
        return False
    match [os.fspath(arg) for arg in args[1:]]:
        case ["-P", "-c", code, *_]:
            return any(f"from {module} import main" in code for module in STARTED)
        case ["-m", "pytest", *_]:
            return True
        case [script, *_]:
            return script.endswith(".py") and TESTS in Path(script).resolve().parents
    return False


_KNOWN = {
    *("stdin", "stdout", "stderr", "env", "cwd", "pass_fds", "text", "bufsize", "encoding"),
    *("close_fds", "universal_newlines", "errors"),
}


# ---- the process that forks --------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> NoReturn:
    """Fork a process for each request, until the other end is closed."""
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    gc.freeze()
    connection.send(_READY)
    while True:
        data, fds, _, _ = socket.recv_fds(connection, _MOST_BYTES, 64)
        if not data:
            os._exit(0)
        read_end, write_end = os.pipe()
        between = os.fork()
        if between == 0:  # Its child's parent is whoever asked, as soon as it has gone itself.
            between = os.getpid()
            child = os.fork()
            if child == 0:
                while os.getppid() == between:  # Its parent is its owner when it begins.
                    time.sleep(0.0005)
                become(json.loads(data), fds)
            os.write(write_end, str(child).encode())
            os._exit(0)
        for fd in (write_end, *fds):
            os.close(fd)
        os.waitpid(between, 0)
        connection.send(os.read(read_end, 64))
        os.close(read_end)


def import_all() -> None:
    """What forks would import: most of the seconds."""
    import torch  # noqa: F401
    from transformers import CONFIG_MAPPING, AutoTokenizer  # noqa: F401  # They read 1,700 files of transformers.

    import weight_sync.process_groups.receiving_child
    import weight_sync.publisher.publisher
    import weight_sync.receiver.receiver  # noqa: F401

    for optional in ("triton", "rollout.server.__main__"):
        with contextlib.suppress(ImportError):
            importlib.import_module(optional)
    from rollout.models.model_config import FAMILIES

    for family in FAMILIES:
        assert CONFIG_MAPPING[family]


def become(request: Mapping[str, Any], fds: Sequence[int]) -> NoReturn:
    """Do what a new Python with this command line would do."""
    code = 1
    try:
        _take_descriptors(fds, request["fds"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        tempfile.tempdir = None
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        known = set(sys.path)
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [path for path in paths if path and path not in known]
        torch = sys.modules["torch"]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        exec(request["prelude"], {})
        _run(request["args"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _take_descriptors(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Have them under these numbers, and no others."""
    beyond = max(*fds, *numbers) + 1
    for fd, number in zip(
        [fcntl.fcntl(fd, fcntl.F_DUPFD, beyond) for fd in fds], numbers, strict=True
    ):
        os.dup2(fd, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in numbers:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _run(args: Sequence[str]) -> None:
    """As `python args...`."""
    main = types.ModuleType("__main__")
    match args:
        case ["-P", "-c", code, *rest]:
            sys.argv = ["-c", *rest]
            compiled = compile(code, "<string>", "exec")
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, str(Path(script).resolve().parent))
            main.__file__ = script
            compiled = compile(Path(script).read_bytes(), script, "exec")
        case _:
            raise ValueError(f"got the command line {args}, expected a script or a module")
    sys.modules["__main__"] = main
    exec(compiled, main.__dict__)


def _become_reaper(on: bool) -> None:
    """Whether orphans below this process become its children."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@contextlib.contextmanager
def forking(which: Forking) -> Iterator[None]:
    """`subprocess.Popen` forks, where it can."""
    subprocess.Popen = which.popen()  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = Started  # type: ignore[misc]


if __name__ == "__main__":
    import_all()
    serve(socket.socket(fileno=int(sys.argv[1])))
