"""What tests of an engine in real processes share: breakpoints, trainers and owners to kill, and a look at /proc."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fault_matrix import PROMPTLY_S
from forks import Popen, Zygote
from versions import TOLERANCE, Reference, output_logprobs, version_weights

import weight_sync
from rollout import Engine
from rollout.engine.executors import rank_process
from rollout.engine.executors import ray as executor_ray
from rollout.engine.executors.ray_rank import RankHost
from rollout.pool import actor as pool_actor
from rollout.pool.actor import EngineHost
from weight_sync.errors import SyncError, TornWeightsError
from weight_sync.publisher.update import Update

HERE = Path(__file__).parent
PROMPT_SETS = [[5, 9, 2], [7] * 21, list(range(20, 41))]
GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


def wait_for(what: str, condition: Any, timeout_s: float = 120.0) -> float:
    """Seconds until `condition()` was true; fails when it does not come true."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.005)
    return time.monotonic() - start


# ---- processes -------------------------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    """It runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def what_it_does(pid: int) -> str:
    """What a process is, and what its threads wait for; a rank says on standard error where in its code that is."""

    def read(path: Path) -> str:
        with suppress(OSError):
            return path.read_text(errors="replace").strip()
        return ""

    with suppress(OSError):
        os.kill(pid, signal.SIGUSR1)
    place, threads = Path(f"/proc/{pid}"), Counter[str]()
    for task in place.glob("task/*"):
        state = read(task / "stat").rpartition(")")[2].split()[:1]
        stack = [line.split()[-1] for line in read(task / "stack").splitlines()[:3]]
        waits_in = " < ".join(stack) or read(task / "wchan")
        threads[" ".join([read(task / "comm"), *state, waits_in])] += 1
    told = ", ".join(f"{number} x {thread}" for thread, number in threads.items())
    return f"process {pid} ({read(place / 'cmdline').replace(chr(0), ' ')[:120]}): {told}"


def num_descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_arenas(pid: int) -> int:
    """Memory files of arenas that a process has mapped or holds open."""
    mapped = Path(f"/proc/{pid}/maps").read_text().count("memfd:weight-arena")
    held = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            held += "memfd:weight-arena" in os.readlink(f"/proc/{pid}/fd/{fd}")
    return mapped + held


def check_descriptors(pids: list[int], before: list[int], spare: int = 0) -> None:
    """Each process gives back what it opened since there were `before`."""

    def given_back() -> bool:
        now = [num_descriptors(pid) for pid in pids]
        return all(a <= b + spare for a, b in zip(now, before, strict=True))

    wait_for("descriptors given back", given_back)


def kill_all(pids: Iterable[int]) -> None:
    """kill -9, also of what is gone already."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- breakpoints -----------------------------------------------------------------------------------------------------


def use_breakpoints(folder: Path, zygote: Zygote | None, more: str = "") -> None:
    """Ranks and actors that this process starts from now on stop at the breakpoints of `folder`.

    zygote: ranks are its forks; None: they begin as users' ranks do. more: statements that a rank runs after that.
    """

    prelude = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        f"from pathlib import Path; from engine_breakpoints import install; install(Path({str(folder)!r}))\n"
        f"{more}"
    )

    class Patched:
        def __getattr__(self, name: str) -> Any:
            return start if name == "Popen" else getattr(subprocess, name)

    def start(command: list[str], **options: Any) -> Any:
        path, main = command[3].split("; from rollout.engine.executors.child ")
        if zygote is not None:
            return Popen(command, zygote=zygote, prelude=prelude, **options)
        code = f"{path}; exec({prelude!r}, {{}}); from rollout.engine.executors.child {main}"
        return subprocess.Popen([*command[:3], code, *command[4:]], **options)

    rank_process.subprocess = Patched()  # type: ignore[assignment]
    executor_ray.RankHost = with_breakpoints(RankHost, folder)  # type: ignore[misc]
    pool_actor.EngineHost = with_breakpoints(EngineHost, folder)  # type: ignore[misc]


def without_breakpoints() -> None:
    """Ranks and actors that this process starts from now on are ordinary ones."""
    rank_process.subprocess = subprocess
    executor_ray.RankHost = RankHost  # type: ignore[misc]
    pool_actor.EngineHost = EngineHost  # type: ignore[misc]


def with_breakpoints(host: type, folder: Path) -> type:
    """What an actor runs, with breakpoints; a class of this function, so that Ray ships it as it is."""
    path, points = str(HERE), str(folder)

    class Host(host):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            sys.path.insert(0, path)
            from engine_breakpoints import install

            install(Path(points))
            super().__init__(*arguments, **options)

    return Host


class Breakpoints:
    """The test's end of `engine_breakpoints.py`; `whom` is a rank, or "pid" and a process id."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def stop(self, point: str, whom: int | str) -> None:
        """Let it stop when it comes to `point`."""
        (self.folder / f"at-{point}-{whom}").unlink(missing_ok=True)
        (self.folder / f"stop-{point}-{whom}").touch()

    def reached(self, point: str, whom: int | str) -> None:
        """Wait until it is there."""
        wait_for(f"{whom} at {point}", (self.folder / f"at-{point}-{whom}").exists)

    def go_on(self, point: str, whom: int | str) -> None:
        """Let it continue, and stop no more."""
        (self.folder / f"stop-{point}-{whom}").unlink(missing_ok=True)

    def hang(self, point: str, whom: int | str) -> None:
        """Let it wait at `point` for ever, and none of its threads do anything any more."""
        (self.folder / f"hang-{point}-{whom}").touch()

    def fail(self, point: str, whom: int | str) -> None:
        """Let it raise at `point`, once."""
        (self.folder / f"fail-{point}-{whom}").touch()

    def damage(self, whom: int | str) -> None:
        """Let the next of its commits write a wrong byte."""
        (self.folder / f"damage-{whom}").touch()

    def clear(self) -> None:
        """Take all of them away."""
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)


# ---- an engine with a client and trainers ----------------------------------------------------------------------------


class FaultyEngine:
    """An engine in child processes with breakpoints, and what its clients should see."""

    def __init__(
        self,
        folder: Path,
        points: Path,
        reference: Reference,
        zygote: Zygote | None,
        *,
        silence_s: float | None = None,
        more: str = "",
        **options: Any,
    ) -> None:
        """silence_s: after how long its ranks give each other up; None: as always. The rest: see `use_breakpoints`."""
        self.folder = folder
        self.points = Breakpoints(points)
        if silence_s is not None:
            (points / "silence").write_text(str(silence_s))
        self.reference = reference
        self.tp_size: int = options.get("tp_size", 1)
        use_breakpoints(points, zygote, more)
        self.engine = Engine(folder, **engine_options(**options))

    @property
    def pids(self) -> list[int]:
        """Of its ranks."""
        return self.engine._executor.pids  # type: ignore[attr-defined,no-any-return]

    @property
    def address(self) -> str:
        """Where trainers connect."""
        return self.engine.address

    def whom(self, rank: int) -> int | str:
        """The name of a rank at breakpoints."""
        return rank

    def serves(self, number: int) -> None:
        """Exactly this version, on all ranks, whole: by its bytes and by what it says."""
        expected = weight_sync.fingerprint(version_weights(self.folder, number))
        assert self.engine.weights_fingerprint() == expected
        assert self.engine.status().torn is None
        reference = self.reference.at(number)
        results = self.engine.generate(
            input_ids=PROMPT_SETS, sampling_params=GREEDY, return_logprob=True
        )
        for prompt, result in zip(PROMPT_SETS, results, strict=True):
            assert reference.greedy_problem(prompt, result) is None

    def allowed_descriptors(self) -> list[int]:
        """How many each of its processes may have open when a test that begins now has ended."""
        return [num_descriptors(pid) for pid in self.pids]

    def holds_no_arena(self) -> None:
        """No rank maps memory of a trainer that is gone."""
        wait_for("the arena let go", lambda: all(num_arenas(pid) == 0 for pid in self.pids))

    def close(self) -> None:
        """Shut down; nothing of it may survive."""
        self.points.clear()
        pids = self.pids
        self.engine.shutdown()
        wait_for("the end of its ranks", lambda: not any(map(is_alive, pids)))


def engine_options(**options: Any) -> dict[str, Any]:
    """Small and quick to start."""
    return {
        "executor": "local",
        "skip_tokenizer_init": True,
        "kv_cache_bytes": 1 << 20,
        "num_threads": 1,
        "kv_policy": "recompute",
        **options,
    }


class Stream:
    """A client that generates, one long request after another, until it is told to stop or gets an error.

    With `endless` it goes on after torn weights have refused or ended a request, which keeps what it had by then. With
    `wait`, the first token is there.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int] | None = None,
        *,
        endless: bool = False,
        num_tokens: int = 60,
        wait: bool = True,
    ) -> None:
        self._engine = engine
        self._endless = endless
        self._num_tokens = num_tokens
        self._prompt = prompt or PROMPT_SETS[0]
        self._stop = False
        self._started = threading.Event()
        self.results: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert not wait or self._started.wait(120)  # a GPU's kernels may have to be compiled first

    def _run(self) -> None:
        params = {"temperature": 1.0, "max_new_tokens": self._num_tokens, "ignore_eos": True}
        try:
            while not self._stop:
                try:
                    for chunk in self._engine.generate(
                        input_ids=self._prompt,
                        sampling_params=params,
                        stream=True,
                        return_logprob=True,
                    ):
                        self._started.set()
                        last = chunk
                except TornWeightsError:
                    if not self._endless:
                        raise
                    time.sleep(0.01)
                else:
                    self.results.append(last)
        except BaseException as error:
            self.error = error
        self.ended = time.monotonic()

    def stop(self) -> list[dict[str, Any]]:
        """All results, each whole; raises what the client got."""
        self._stop = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        assert self.results
        return self.results

    def died(self) -> BaseException:
        """Wait for its error."""
        self._thread.join(PROMPTLY_S + 5)
        assert not self._thread.is_alive(), "a caller still waits for an engine that is gone"
        assert self.error is not None, self.results[-1]["meta_info"]["finish_reason"]
        return self.error


def check_spans(prompt: list[int], result: dict[str, Any], reference: Reference) -> list[int]:
    """Every token was computed by the version that its span names, and by no other; returns the versions in order.

    For engines that recompute older keys and values, and labels v<number> ("0": the checkpoint).
    """
    output, got = result["output_ids"], output_logprobs(result)
    numbers, end = [], 0
    for span in result["meta_info"]["weight_versions"]:
        assert span["start"] == end < span["end"]
        end, number = span["end"], int(span["version"].removeprefix("v"))
        numbers.append(number)
        expected = reference.at(number).logprobs(prompt, output[:end])[span["start"] :]
        gaps = [abs(a - b) for a, b in zip(got[span["start"] : end], expected, strict=True)]
        assert max(gaps) < TOLERANCE, (number, span, max(gaps))
    assert end == len(output)
    return numbers


class Actor:
    """A process of the nursery."""

    goes_on = False
    """It does more after it has said how it went, so that nobody ends it before."""

    def __init__(self, report: Path) -> None:
        self._report = report
        wait_for("the fork", lambda: self.lines() != [])
        self.pid: int = self.lines()[0]["pid"]

    def lines(self) -> list[dict[str, Any]]:
        """All that it has said so far."""
        if not self._report.exists():
            return []
        text = self._report.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def says(self, timeout_s: float = 120.0, *, number: int = 1) -> dict[str, Any]:
        """How it went; or another line of its report."""
        there = lambda: len(self.lines()) > number  # noqa: E731
        wait_for("its report", lambda: there() or not is_alive(self.pid), timeout_s)
        return self.lines()[number]

    def kill(self) -> None:
        """kill -9; nobody collects it, so that it is a zombie for a while, as in life."""
        kill_all([self.pid])
        wait_for("its death", lambda: not is_alive(self.pid))


class Nursery:
    """The test's end of `engine_nursery.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._actors: list[Actor] = []
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_nursery.py")],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def trainer(
        self,
        address: str,
        folder: Path,
        number: int,
        *,
        commits: bool = True,
        transport: str = "auto",
        halfway: bool = False,
        **options: Any,
    ) -> Actor:
        """A trainer that publishes version `number` at once, or only stages it.

        With `halfway` it announces the second bucket, says so, and never broadcasts it.
        """
        update = {"folder": str(folder), "number": number, "commits": commits}
        update |= {"transport": transport, "halfway": halfway}
        return self._make("trainer", {"address": address, **update, "options": options})

    def owner(self, folder: Path, points: Path, *, ray: str = "", **options: Any) -> Actor:
        """The owner of an engine, or with `num_replicas` of a pool; `ray`: address of the cluster that it joins."""
        made = {"folder": str(folder), "points": str(points), "options": engine_options(**options)}
        env = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        env["TMPDIR"] = tempfile.gettempdir()
        return self._make("owner", {**made, "ray": ray, "env": env})

    def _make(self, role: str, options: dict[str, Any]) -> Actor:
        self._count += 1
        report = self._folder / f"actor-{self._count}.jsonl"
        assert self._process.stdin is not None
        request = {"role": role, "report": str(report), "options": options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._actors.append(Actor(report))
        return self._actors[-1]

    def close(self) -> None:
        """End all."""
        kill_all([actor.pid for actor in self._actors])
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextmanager
def changed_fingerprints() -> Iterator[None]:
    """The trainer declares something else than it has packed."""
    finish = Update.finish

    def lie(self: Update, rows: list[int]) -> Any:
        packed = finish(self, rows)
        packed.fingerprints[0] ^= 1
        return packed

    Update.finish = lie  # type: ignore[method-assign]
    try:
        yield
    finally:
        Update.finish = finish  # type: ignore[method-assign]


def error_name(action: Any) -> str:
    """Class name of the `SyncError` that `action` must raise."""
    try:
        action()
    except SyncError as error:
        return type(error).__name__
    raise AssertionError("no error was raised")
