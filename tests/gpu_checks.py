"""All that needs GPUs in one command: checks first, then times, then a table of both.

    python tests/gpu_checks.py --out FOLDER                 everything, on all visible GPUs
    python tests/gpu_checks.py --out FOLDER --total-s 560   as much as fits; call again for the rest
    python tests/gpu_checks.py --out FOLDER --parts nccl sync-large    some, also if they have passed before

A part is one process with a limit of its own; test files run side by side, a few on each GPU, benchmarks have a GPU to
themselves. Whatever fails or hangs, the next one runs: a test that hangs is ended with its process, and the tests
behind it run in another one. FOLDER gets `results.json` (every part, with the result file of its benchmark),
`table.txt`, `tests.log` and `benchmarks.log`. Parts that have passed there are not run again.

As a pytest plugin (`-p gpu_checks`) this file notes which test begins and how it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD, DONE = "GPU_CHECKS_RECORD", "GPU_CHECKS_DONE"
SLOTS = 4
"""Test files that run on one GPU at once."""
KEPT_BYTES = 200_000
"""Of the end of a part's output."""
BENCH = "from rollout_benchmarks.command import app; app()"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process, or a few after each other where a test hangs."""

    name: str
    """What `--parts` calls it."""
    command: tuple[str, ...]
    """Arguments of Python; "{json}" stands for where its result goes, "{out}" for the folder of the report."""
    kind: str = "tests"
    """"tests" (of pytest), "benchmark", or "command", whose exit status counts failures."""
    gpus: int = 1
    """How many it sees, where there are so many."""
    least: int | None = None
    """With fewer it does not run; None: all that it sees."""
    alone: bool = False
    """Nothing else may run on them."""
    limit_s: float = 240.0
    """It is ended after that."""
    test_s: float = 120.0
    """One test of it is ended after that."""

    @property
    def slots(self) -> int:
        """Of each of its GPUs."""
        return SLOTS if self.alone or self.kind == "benchmark" else 1


def suite(name: str, *files: str, **options: Any) -> Part:
    """The tests marked gpu of some files."""
    paths = [f"tests/{file}.py" for file in files]
    command = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "gpu_checks", "-m", "gpu")
    return Part(name=name, command=(*command, *paths), **options)


def bench(name: str, command: str, *settings: str, **options: Any) -> Part:
    """A benchmark with a result file."""
    chosen = [word for setting in settings for word in ("--set", setting)]
    words = ("-c", BENCH, *command.split(), *chosen, "--out", "{json}")
    return Part(name=name, command=words, kind="benchmark", **options)


def large(section: str) -> list[str]:
    """Settings of a benchmark that make its model Qwen3-8B's."""
    sys.path.insert(0, str(ROOT / "typings"))
    from rollout_benchmarks.settings import LARGE

    return [f"{section}.model.{key}={json.dumps(value)}" for key, value in vars(LARGE).items()]


def all_parts() -> list[Part]:
    """Longest first among the tests, so that none is left alone at the end."""
    slow = {"limit_s": 420.0}
    some: dict[str, Any] = {"gpus": 2, "least": 1}
    commits = "sync/test_exchanged_memory", "sync/test_read_back"
    pair: dict[str, Any] = {"gpus": 2, "limit_s": 200.0}
    return [
        suite("nccl", "sync/test_nccl_groups", gpus=2, test_s=100.0, **slow),
        suite("two-ranks", "parity/test_steps_of_two_ranks", gpus=2, test_s=150.0, **slow),
        suite("peer-reads", "sync/test_peer_reads", gpus=2, **slow),
        suite("experts-of-ranks", "sync/test_expert_parallel", gpus=2, **slow),
        suite("updates", "sync/test_gpu_updates", *commits, **some, **slow),
        Part(
            name="faults",
            command=("tests/faults/gpu_faults.py", "{out}/faults_gpu.md"),
            kind="command",
            **some,
            **slow,
        ),
        suite(
            "memory",
            "engine/test_memory_rounds",
            "engine/test_memory_occupation",
            alone=True,
            test_s=200.0,
            limit_s=420.0,
        ),
        suite("kv-size", "engine/test_kv_size", alone=True),
        suite("sampling", "kernels/test_sampling_kernels", "kernels/test_token_logprobs", **slow),
        suite("attention", "kernels/test_paged_attention", "kernels/test_decode_order", **slow),
        suite("edges", "kernels/test_kernel_edges", "kernels/test_layer_kernels", **slow),
        suite("deterministic", "parity/test_deterministic", **slow),
        suite("mixtures", "parity/test_deterministic_mixtures", **slow),
        suite("experts", "kernels/test_grouped_experts", "kernels/test_expert_routing", **slow),
        suite("matmul", "kernels/test_invariant_matmul", "kernels/test_few_rows_matmul", **slow),
        suite("bytes", "kernels/test_fingerprint", "kernels/test_finite_numbers", **some, **slow),
        suite("no-waits", "engine/test_no_syncs", **slow),
        suite("bfloat16", "parity/test_bfloat16", "parity/test_flash_backend", **slow),
        suite("embeddings", "parity/test_input_embeds", **slow),
        suite("ray", "engine/test_ray_gpu", **some),
        suite("bench", "engine/test_bench", **some),
        bench("between-small", "gpu", gpus=2, limit_s=120.0),
        bench(
            "between-large",
            "gpu",
            *large("gpu"),
            *('gpu.ways=["peer_reads", "two_buckets", "nccl"]', "gpu.repetitions=9"),
            gpus=2,
            limit_s=200.0,
        ),
        bench(
            "between-large-two-ranks",
            "gpu",
            *large("gpu"),
            *('gpu.ways=["peer_reads", "two_buckets"]', "gpu.repetitions=9", "gpu.tp_size=2"),
            gpus=2,
            limit_s=200.0,
        ),
        bench("sync-small", "gpu sync", 'gpu_sync.only="small"', limit_s=150.0),
        bench(
            "sync-large",
            "gpu sync",
            *('gpu_sync.only="large"', "gpu_sync.repetitions=7", "gpu_sync.cpu_repetitions=2"),
            *("gpu_sync.warmup=2", "gpu_sync.budget_s=180"),
            limit_s=240.0,
        ),
        bench("sync-experts", "gpu sync", 'gpu_sync.only="experts"', limit_s=150.0),
        bench("generate-small", "gpu generate", limit_s=150.0),
        bench("generate-large", "gpu generate", *large("gpu_generate"), limit_s=200.0),
        bench("generate-small-two-ranks", "gpu generate", "gpu_generate.tp_size=2", **pair),
        bench(
            "generate-large-two-ranks",
            "gpu generate",
            *large("gpu_generate"),
            "gpu_generate.tp_size=2",
            gpus=2,
            limit_s=200.0,
        ),
        bench("generate-experts", "gpu experts", limit_s=240.0),
        bench("few-rows", "gpu few-rows"),
    ]


# ---- what a part came to ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Outcome:
    """As it is in `results.json`."""

    state: str
    """"passed", "failed" or "not run"."""
    why: str = ""
    """Of a part that did not pass, in words."""
    seconds: float = 0.0
    tests: dict[str, str] = field(default_factory=dict)
    """Each test's "passed", "failed" or "skipped"."""
    result: dict[str, Any] | None = None
    """The result file of a benchmark."""

    def count(self, how: str) -> int:
        """Tests that ended so."""
        return sum(value == how for value in self.tests.values())


class Run:
    """A part that runs. `poll` is to be called now and then."""

    def __init__(self, part: Part, gpus: Sequence[str], folder: Path, out: Path) -> None:
        self.part, self.gpus = part, list(gpus)
        self._folder, self._out = folder, out
        folder.mkdir()
        self._record, self._done = folder / "record.jsonl", folder / "done.txt"
        self._record.touch()
        self._log = (folder / "log").open("wb")
        self._began = time.monotonic()
        self._tests: dict[str, str] = {}
        self._why: list[str] = []
        self._start()

    @property
    def log(self) -> str:
        """The end of what it printed."""
        data = (self._folder / "log").read_bytes()[-KEPT_BYTES:]
        return data.decode(errors="replace")

    def _start(self) -> None:
        part, seen = self.part, ",".join(self.gpus)
        self._done.write_text("\n".join(self._tests))
        paths = [ROOT, ROOT / "typings", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, *(self._filled(word) for word in part.command)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "PYTHONUNBUFFERED": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                RECORD: str(self._record),
                DONE: str(self._done),
                **({"CUDA_VISIBLE_DEVICES": seen} if seen else {}),
                **({"OMP_NUM_THREADS": "1"} if part.kind == "tests" else {}),
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _filled(self, word: str) -> str:
        return word.replace("{out}", str(self._out)).replace("{json}", str(self._json))

    @property
    def _json(self) -> Path:
        return self._folder / "result.json"

    def poll(self, total_end: float) -> Outcome | None:
        """What it came to; None while it runs. `total_end`, `time.monotonic()`: when everything has to end."""
        now = time.monotonic()
        running, since = self._read()
        status = self._process.poll()
        if status is not None:
            return self._ended(status, running)
        late = now - self._began > self.part.limit_s
        if late or now > total_end:
            self._kill()
            limit = f"its {self.part.limit_s:.0f} s" if late else "the time of this call"
            during = f" during {running}" if running else ""
            self._why.append(f"ended after {limit}{during}")
            return self._outcome()
        if running and time.time() - since > self.part.test_s:
            self._kill()
            self._tests[running] = "failed"
            self._why.append(f"{running}: took more than {self.part.test_s:.0f} s")
            self._start()
        return None

    def _read(self) -> tuple[str, float]:
        """Take in the tests that have ended; the one that runs, and since when (`time.time()`)."""
        running, since = "", 0.0
        for line in self._record.read_text().splitlines():
            with suppress(ValueError):  # the last one may be half written
                note = json.loads(line)
                if "begins" in note:
                    running, since = note["begins"], note["at"]
                else:
                    self._tests[note["ends"]] = note["how"]
                    running = "" if running == note["ends"] else running
        return ("" if running in self._tests else running), since

    def _ended(self, status: int, running: str) -> Outcome | None:
        part = self.part
        if part.kind == "tests" and running and status not in (0, 1, 5):
            self._kill()
            self._tests[running] = "failed"
            self._why.append(f"{running}: its process ended with {status}")
            self._start()
            return None
        allowed = (0, 1, 5) if part.kind == "tests" else (0,)  # 5: it has none
        if status not in allowed:
            self._why.append(f"exit status {status}")
        self._kill()  # what it has left behind
        return self._outcome()

    def _outcome(self) -> Outcome:
        self._log.close()
        failed = [name for name, how in self._tests.items() if how == "failed"]
        self._why += [f"{name}: failed" for name in failed if name not in " ".join(self._why)]
        result = None
        with suppress(OSError, ValueError):
            result = json.loads(self._json.read_text())
        if self.part.kind == "benchmark" and result is None:
            self._why.append("no result")
        return Outcome(
            state="failed" if self._why else "passed",
            why="; ".join(self._why),
            seconds=time.monotonic() - self._began,
            tests=self._tests,
            result=result,
        )

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)


# ---- all of them -----------------------------------------------------------------------------------------------------


class Checks:
    """The parts of one call, their GPUs, and the folder that they are reported in."""

    def __init__(self, out: Path, parts: Sequence[Part], gpus: Sequence[str]) -> None:
        self.out, self.parts = out, list(parts)
        self._free = dict.fromkeys(gpus, SLOTS)
        out.mkdir(parents=True, exist_ok=True)
        self.outcomes: dict[str, Outcome] = {}
        with suppress(OSError, ValueError):
            known = json.loads((out / "results.json").read_text())["parts"]
            self.outcomes = {name: Outcome(**value) for name, value in known.items()}

    def run(self, *, total_s: float = 1e9, again: bool = False) -> None:
        """Tests first; no benchmark runs beside one. again: also what has passed."""
        end = time.monotonic() + total_s
        wanted = [p for p in self.parts if again or not self._passed(p)]
        with tempfile.TemporaryDirectory(prefix="gpu-checks-") as folder:
            for benchmarks in (False, True):
                some = [part for part in wanted if (part.kind == "benchmark") == benchmarks]
                self._run_some(some, Path(folder), end)
        self._write()

    def _passed(self, part: Part) -> bool:
        known = self.outcomes.get(part.name)
        return known is not None and known.state == "passed"

    def _run_some(self, waiting: list[Part], folder: Path, end: float) -> None:
        running: list[Run] = []
        while waiting or running:
            for part in list(waiting):
                least = part.gpus if part.least is None else part.least
                if least > len(self._free):
                    why = f"needs {least} GPUs, got {len(self._free)}"
                elif time.monotonic() > end - 20:  # less than any part takes
                    why = "no time was left; call again"
                elif (gpus := self._take(part)) is not None:
                    print(f"{part.name} begins on {', '.join(gpus) or 'the CPU'}", flush=True)
                    running.append(Run(part, gpus, folder / part.name, self.out))
                    waiting.remove(part)
                    continue
                else:
                    continue
                waiting.remove(part)
                self._note(part, Outcome(state="not run", why=why), "")
            for run in list(running):
                outcome = run.poll(end)
                if outcome is not None:
                    running.remove(run)
                    for gpu in run.gpus:
                        self._free[gpu] += run.part.slots
                    self._note(run.part, outcome, run.log)
            time.sleep(0.2)

    def _take(self, part: Part) -> list[str] | None:
        """GPUs with room for it, the emptiest first; None: there are not enough at present."""
        roomy = [gpu for gpu, slots in self._free.items() if slots >= part.slots]
        if len(roomy) < (wanted := min(part.gpus, len(self._free))):
            return None
        chosen = sorted(sorted(roomy, key=lambda gpu: -self._free[gpu])[:wanted])
        for gpu in chosen:
            self._free[gpu] -= part.slots
        return chosen

    def _note(self, part: Part, outcome: Outcome, log: str) -> None:
        self.outcomes[part.name] = outcome
        print(
            f"{part.name}: {outcome.state} after {outcome.seconds:.0f} s {outcome.why}", flush=True
        )
        if log:
            name = "benchmarks.log" if part.kind == "benchmark" else "tests.log"
            with (self.out / name).open("a") as file:
                file.write(f"===== {part.name}: {outcome.state} {outcome.why}\n{log}\n")
        self._write()

    def _write(self) -> None:
        content = {"parts": {name: vars(outcome) for name, outcome in self.outcomes.items()}}
        whole = self.out / "results.json.new"
        whole.write_text(json.dumps(content, indent=1) + "\n")
        whole.replace(self.out / "results.json")
        (self.out / "table.txt").write_text(self.table())

    def table(self) -> str:
        """A row for each part, and below it what a benchmark found or what failed."""
        lines = [f"{'part':26} {'':8} {'passed':>6} {'failed':>6} {'skipped':>7} {'seconds':>7}"]
        for part in self.parts:
            outcome = self.outcomes.get(part.name) or Outcome(state="not run")
            counts = [outcome.count(how) or "" for how in ("passed", "failed", "skipped")]
            cells = "{:>6} {:>6} {:>7}".format(*counts)
            lines.append(f"{part.name:26} {outcome.state:8} {cells} {outcome.seconds:7.0f}")
            lines += [f"    {why}" for why in outcome.why.split("; ") if why]
            lines += [f"    {figure}" for figure in figures(outcome.result)]
        return "\n".join(lines) + "\n"


def figures(result: dict[str, Any] | None) -> Iterator[str]:
    """What a benchmark found, beside what the machine allows and what it should be."""
    for row in (result or {}).get("headline", ()):
        goal = f", {row['ratio']} of {row['floor']}" if row["floor"] else ""
        if row["target"]:
            goal += f"; {row['target']}: {'met' if row['met'] else 'MISSED'}"
        yield f"{row['what']}: {row['measured']}{goal}"


def visible_gpus() -> list[str]:
    """As `CUDA_VISIBLE_DEVICES` would name them."""
    import torch

    named = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return named or list(map(str, range(torch.cuda.device_count())))


def chosen(parts: Iterable[Part], names: Sequence[str]) -> list[Part]:
    """Those that a name, or its beginning, stands for; all without names."""
    parts = list(parts)
    unknown = [name for name in names if not any(p.name.startswith(name) for p in parts)]
    if unknown:
        known = ", ".join(part.name for part in parts)
        raise SystemExit(f"--parts: got {', '.join(unknown)}, expected some of {known}")
    exact = {part.name for part in parts}
    return [
        part
        for part in parts
        if not names
        or any(part.name == name if name in exact else part.name.startswith(name) for name in names)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The number of parts that did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--parts", nargs="+", default=[], help="names, or how they begin")
    parser.add_argument("--budget-s", type=float, help="most seconds of one benchmark")
    parser.add_argument("--total-s", type=float, default=1e9, help="most seconds of this call")
    options = parser.parse_args(arguments)
    parts = chosen(all_parts(), options.parts)
    for i, part in enumerate(parts):
        if options.budget_s is not None and part.kind == "benchmark":
            parts[i] = replace(part, limit_s=min(part.limit_s, options.budget_s))
    checks = Checks(options.out.absolute(), parts, visible_gpus())
    checks.run(total_s=options.total_s, again=bool(options.parts))
    print(checks.table())
    return sum(not checks._passed(part) for part in parts)


# ---- inside pytest ---------------------------------------------------------------------------------------------------


def _tell(**note: Any) -> None:
    with open(os.environ[RECORD], "a") as file:
        file.write(json.dumps(note) + "\n")


def pytest_collection_modifyitems(items: list[Any], config: Any) -> None:
    """Leave out what an earlier process of this part has done."""
    done = set(Path(os.environ[DONE]).read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _tell(begins=nodeid, at=time.time())


_worst: dict[str, str] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """Of its setup, of itself, and last of its teardown."""
    ranks = ("passed", "skipped", "failed")
    before = _worst.get(report.nodeid, "passed")
    _worst[report.nodeid] = max(before, report.outcome, key=ranks.index)
    if report.when == "teardown":
        _tell(ends=report.nodeid, how=_worst[report.nodeid])


if __name__ == "__main__":
    sys.exit(main())
