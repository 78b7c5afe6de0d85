"""`rollout bench`: one sub-command per benchmark; found through the entry point of that name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rollout.cli.options import ConfigFile, Overrides, as_toml
from rollout.settings import load_settings

from .settings import QUICK, BenchSettings

if TYPE_CHECKING:
    from .results import BenchResult
    from .screen import Screen

EPILOG = """[bold]Examples[/bold]

  rollout bench sync

  rollout bench pause --set pause.batch_size=16

  rollout bench group --set group.tp_sizes=[1]

  rollout bench generate --quick --out /tmp/generate.json

  rollout bench machine --gigabytes 0.5

  rollout bench print-config > bench.toml

[bold]Results[/bold]

  JSON in benchmarks/results/NAME-DEVICE.json, or where --out says, and a
  picture next to it: settings, device, commit, percentiles, and what the
  machine allows beside what was measured. --quick writes only where --out says.
"""

GROUP_EPILOG = """[bold]Examples[/bold]

  rollout bench group --quick

  rollout bench group --set group.tp_sizes=[1] --set group.repetitions=30

  rollout bench group --set group.model.num_layers=4 --out /tmp/group.json

[bold]Reading it[/bold]

  "wire and messages" is begin to committed less the check of the staged bytes
  and the copy. "copies" and "of bound" are ratios within a round, median.
"""

app = typer.Typer(
    help="Measure the engine, next to what the machine allows and to the usual way.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
)

#: Where a benchmark writes its result file; every benchmark takes this option.
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Write the result as JSON here, and a picture beside it.",
        show_default=False,
    ),
]  # fmt: skip
Quick = Annotated[
    bool, typer.Option("--quick", help="Tiny sizes, a few seconds: shows that it works.")
]
Write = Annotated[
    bool, typer.Option("--write", help="Store the best for this device, where kernels look.")
]
Tiny = Annotated[bool, typer.Option("--tiny", help="Little data, to try the search; needs no GPU.")]


@app.callback()
def bench() -> None:
    """A callback keeps this a group."""


@app.command("sync")
def sync(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """What a weight update of an engine in another process costs.

    A Qwen3-0.6B-shaped model in bfloat16, 20,000 small tensors, and the 18,867 of a mixture of experts; next to plain
    copies of the same bytes and to the usual way (concatenate, copy out), all in turns.
    """

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .sync import run_sync

        return run_sync(settings.sync, screen)

    _benchmark(run, quick, out, config, overrides)


@app.command("pause")
def pause(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """How much longer a streaming client waits for a token because of a weight update."""

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .pause import run_pause

        return run_pause(settings.pause, screen)

    _benchmark(run, quick, out, config, overrides)


@app.command("generate")
def generate(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """Output tokens per second next to transformers' generate, and where the engine's time goes."""

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .generate import run_generate

        return run_generate(settings.generate, screen)

    _benchmark(run, quick, out, config, overrides)


@app.command("serve")
def serve(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """What HTTP costs: the same requests to one engine in process and over HTTP, in turns; what streams wait."""

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .serve import run_serve

        return run_serve(settings.serve, screen)

    _benchmark(run, quick, out, config, overrides)


@app.command("pool")
def pool(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """What an update of many replicas costs besides the bytes: one tiny model, one engine and a pool in turns."""

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .pool import run_pool

        return run_pool(settings.pool, screen)

    _benchmark(run, quick, out, config, overrides)


@app.command("group", epilog=GROUP_EPILOG)
def group(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """What a weight update over a process group costs: gloo, on the loopback.

    A Qwen3-0.6B-shaped model in bfloat16, to an engine of one rank, then to one
    of two. In the same rounds: a plain copy of the bytes, and the bytes over
    plain sockets; beside the first engine also a broadcast over an update group
    with no update around it, and the usual ways, which check nothing (a gloo
    broadcast per tensor, or one of all tensors concatenated).

    The bound is three copies, or the bytes over plain sockets, whichever takes
    longer. Needs about 12 GB of memory.
    """

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .group import run_group

        return run_group(settings.group, screen)

    _benchmark(run, quick, out, config, overrides)


gpu_app = typer.Typer(help="Updates and generation on GPUs.", invoke_without_command=True)
app.add_typer(gpu_app, name="gpu")


@gpu_app.callback()
def gpu(
    context: typer.Context,
    quick: Quick = False,
    out: Out = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """What an update costs when trainer and engine have a GPU each: peer reads, NCCL, shared memory, gloo.

    A Qwen3-0.6B-shaped model in bfloat16, next to one copy of its bytes from GPU to GPU. Needs a GPU more than the
    engine has ranks; without NCCL the trainer may share the last one of several.
    """

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .gpu import run_gpu

        return run_gpu(settings.gpu, screen)

    if context.invoked_subcommand is None:
        _benchmark(run, quick, out, config, overrides)


@gpu_app.command("sync")
def gpu_sync(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """What an update costs when trainer and engine are two processes on one GPU.

    Qwen3-0.6B's and Qwen3-8B's shapes in bfloat16: the whole call, begin to
    verified, the pause of the engine and what a client sees of it, from the CPU,
    memory given back and taken again; then 18,432 expert tensors next to the
    same bytes dense. Floors are measured in the same run. Needs 60 GB of a GPU's
    memory, or --set gpu_sync.only=small; with --set gpu_sync.budget_s=180 no
    series of a model begins after three minutes.
    """

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .gpu_sync import run_gpu_sync

        return run_gpu_sync(settings.gpu_sync, screen)

    _benchmark(run, quick, out, config, overrides)


@gpu_app.command("generate")
def gpu_generate(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """Decode steps, prefill, and the RL shape on one GPU, next to what its memory allows.

    Random weights of Qwen3-0.6B's shape in bfloat16; log-probabilities of sampled tokens are asked for throughout.
    """

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .gpu_generate import run_gpu_generate

        return run_gpu_generate(settings.gpu_generate, screen)

    _benchmark(run, quick, out, config, overrides)


@gpu_app.command("experts")
def gpu_experts(
    quick: Quick = False, out: Out = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """A mixture of experts on one GPU: decode steps and prefill next to what its memory allows, and its kernels alone.

    Random weights of Qwen3-30B-A3B's shape in bfloat16, 61 GB; --set gpu_experts.model.num_layers=12 needs a quarter.
    `python -m rollout_benchmarks.expert_kernels --write` searches the shapes of the kernels' launches beforehand.
    """

    def run(settings: BenchSettings, screen: Screen) -> BenchResult:
        from .gpu_experts import run_gpu_experts

        return run_gpu_experts(settings.gpu_experts, screen)

    _benchmark(run, quick, out, config, overrides)


def _search(module: str, write: bool, tiny: bool, out: Path | None) -> NoReturn:
    import torch

    if tiny and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # triton looks for it when kernels are imported
    main: Callable[[Sequence[str]], int] = import_module(f".{module}", __package__).main
    where = ["--out", str(out)] if out is not None else []
    raise typer.Exit(main([*["--write"] * write, *["--tiny"] * tiny, *where]))


@gpu_app.command("attention-kernels")
def gpu_attention_kernels(
    write: Write = False,
    out: Out = None,
    tiny: Tiny = False,
) -> None:
    """Search the shapes of the attention kernels' launches on this GPU: decode, shared prefixes, prefill.

    Heads of 64 and 128, 1 to 8 query heads to a KV head, 16-bit types; about a minute and a half.
    `python -m rollout_benchmarks.attention_kernels --head-dims 256` searches others.
    """
    _search("attention_kernels", write, tiny, out)


@gpu_app.command("few-rows")
def gpu_few_rows(
    write: Write = False,
    out: Out = None,
    tiny: Tiny = False,
) -> None:
    """Search for which matrix products of 1 to 16 rows our kernel beats torch's on this GPU, and with which launch.

    The products of Qwen3, Qwen2.5 and Llama from 0.6B to 8B and of Qwen3-30B-A3B on one GPU, in bfloat16; some minutes,
    of which nothing is lost when it is interrupted. An engine uses what is stored for its device.
    """
    _search("few_rows", write, tiny, out)


@app.command("machine")
def machine(
    gigabytes: Annotated[float, typer.Option(help="Bytes to copy, in units of 1e9.")] = 1.19,
    repeats: Annotated[int, typer.Option(help="Copies to time.")] = 10,
    out: Out = None,
) -> None:
    """How fast this machine copies memory: the floor of every weight update."""
    from .machine import measure_copy
    from .results import show, write_result

    result = measure_copy(num_bytes=int(gigabytes * 1e9), repeats=repeats)
    show(result)
    if out is not None:
        write_result(out, result)


@app.command("print-config")
def print_config(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print the settings of all benchmarks as TOML, for --config."""
    typer.echo(as_toml(load_settings(BenchSettings, config, overrides or ())))


def _benchmark(
    run: Callable[[BenchSettings, Screen], BenchResult],
    quick: bool,
    out: Path | None,
    config: Path | None,
    overrides: list[str] | None,
) -> None:
    """Settings, the run, the tables, the files."""
    settings = load_settings(BenchSettings, config, [*(QUICK if quick else ()), *(overrides or ())])
    from .results import check_out, default_path, show, write_result
    from .screen import Screen

    if out is not None:
        check_out(out)
    screen = Screen()
    result = run(settings, screen)
    if quick:
        result = result.at_tiny_sizes()
    show(result, screen)
    path = out if out is not None else None if quick else default_path(result)
    if path is not None:
        for written in write_result(path, result):
            screen.say(f"written: {written}")
