"""`rollout generate`: complete prompts from arguments, a file or standard input."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..config import EngineConfig
from ..sampling_params import SamplingParams
from ..settings import load_settings
from .options import (
    ConfigFile,
    Overrides,
    as_overrides,
    as_toml,
    check_model_given,
    setting_option,
)
from .output import Writer, check_output, finished_records, results_file
from .prompts import (
    BadRecords,
    PromptRecord,
    apply_chat_template,
    check_records,
    merged_params,
    read_prompts,
)

if TYPE_CHECKING:
    from rollout import Engine

OutputFormat = Literal["pretty", "jsonl"]

EPILOG = """[bold]Examples[/bold]

  rollout generate -m PATH "Once upon a time" "The end"

  rollout generate -m PATH --chat -n 4 "Name a prime above 100."

  rollout generate -m PATH -i prompts.jsonl -o samples.jsonl --logprobs

  rollout generate -m PATH -i prompts.jsonl -o samples.jsonl --resume

  cat questions.txt | rollout generate -m PATH --format jsonl

  rollout generate -m PATH --set sampling.repetition_penalty=1.1 "Hello"

  rollout generate --print-config > my.toml

[bold]Input files[/bold]

  A line is a JSON object, or else the text of a prompt. An object has one of
  prompt, input_ids or messages, and perhaps sampling_params of its own; its
  other keys are copied to the output. All prompts are checked before the
  engine starts; results are in FILE.partial until they are complete.
"""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What `rollout generate` reads from `--config` and `--set`."""

    engine: EngineConfig
    """The engine, as in `rollout.Engine(...)`."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How to sample; a record's own `sampling_params` win."""
    return_logprob: bool = False
    """Write the log-probability of every sampled token to the output."""
    concurrency: int = 1024
    """Prompts handed to the engine at once, at most."""


# Options. Those that stand for a setting are None when they are not given, so that files and --set keep their word.
Prompts = Annotated[
    list[str] | None, typer.Argument(help="Prompts; none: --input, or standard input.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder of the model (engine.model_path).")
]
Input = Annotated[
    Path | None,
    typer.Option("--input", "-i", help="JSONL file, or one prompt per line; - is standard input."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write JSONL here, in the order of the input.")
]
Format = Annotated[
    OutputFormat | None,
    typer.Option("--format", help="Of standard output; default: pretty on a terminal, else jsonl."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Wrap each text prompt in the tokenizer's chat template.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the unfinished results of --output.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out prompts that cannot be used, and say which.")
]
Samples = Annotated[int | None, setting_option(SamplingParams, "n", "-n")]
MaxNewTokens = Annotated[int | None, setting_option(SamplingParams, "max_new_tokens")]
Temperature = Annotated[float | None, setting_option(SamplingParams, "temperature")]
TopP = Annotated[float | None, setting_option(SamplingParams, "top_p")]
TopK = Annotated[int | None, setting_option(SamplingParams, "top_k")]
MinP = Annotated[float | None, setting_option(SamplingParams, "min_p")]
Stop = Annotated[
    list[str] | None,
    setting_option(SamplingParams, "stop", text="String that ends the output; repeatable."),
]
Seed = Annotated[int | None, setting_option(SamplingParams, "sampling_seed", "--seed")]
Logprobs = Annotated[bool | None, setting_option(GenerateSettings, "return_logprob", "--logprobs")]
Dtype = Annotated[str | None, setting_option(EngineConfig, "dtype")]
Device = Annotated[str | None, setting_option(EngineConfig, "device")]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the settings as TOML and exit.")
]


def generate(
    prompts: Prompts = None,
    model: Model = None,
    input_path: Input = None,
    output_path: Output = None,
    output_format: Format = None,
    chat: Chat = False,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    num_samples: Samples = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    stop: Stop = None,
    sampling_seed: Seed = None,
    logprobs: Logprobs = None,
    dtype: Dtype = None,
    device: Device = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Complete prompts with a model; what is not an option here is a setting of --config and --set."""
    options: dict[str, Any] = {
        "engine.model_path": model,
        "engine.dtype": dtype,
        "engine.device": device,
        "return_logprob": logprobs,
        "sampling.n": num_samples,
        "sampling.max_new_tokens": max_new_tokens,
        "sampling.temperature": temperature,
        "sampling.top_p": top_p,
        "sampling.top_k": top_k,
        "sampling.min_p": min_p,
        "sampling.stop": stop,
        "sampling.sampling_seed": sampling_seed,
    }
    if print_config and config is None and model is None:
        options["engine.model_path"] = "PATH"
    else:
        check_model_given(model, config, overrides)
    settings = load_settings(GenerateSettings, config, [*(overrides or ()), *as_overrides(options)])
    if print_config:
        typer.echo(as_toml(settings))
        return
    if output_path is not None:
        check_output(output_path, resume=resume)
    bad = BadRecords()
    records = _checked(settings, read_prompts(prompts or (), input_path, bad), bad, wrap=chat)
    bad.raise_unless(skip_bad)
    for problem in bad.problems:
        typer.echo(f"skipped: {problem}", err=True)
    pretty = output_path is None and (
        output_format == "pretty" or (output_format is None and sys.stdout.isatty())
    )
    if output_path is None:
        _run(settings, records, Writer(sys.stdout, pretty=pretty))
        return
    per_record = [int(merged_params(settings.sampling, record)["n"]) for record in records]
    done, kept_bytes = finished_records(output_path, records, per_record)
    if done:
        typer.echo(f"resumed: {done:,} of {len(records):,} prompts are done", err=True)
    with results_file(output_path, kept_bytes) as out:
        _run(settings, records[done:], Writer(out, pretty=False))


def _checked(
    settings: GenerateSettings, records: list[PromptRecord], bad: BadRecords, *, wrap: bool
) -> list[PromptRecord]:
    """The records that the engine will take, chats rendered, before an engine is started."""
    from ..engine.loop.checks import check_start
    from ..models.model_config import ModelConfig
    from ..tokenizer import Tokenizer

    engine = settings.engine
    check_start(engine)
    model = ModelConfig.from_folder(engine.model_path)
    tokenizer_path = engine.tokenizer_path or engine.model_path
    return check_records(
        apply_chat_template(records, tokenizer_path, wrap=wrap),
        sampling=settings.sampling,
        tokenizer=None if engine.skip_tokenizer_init else Tokenizer(tokenizer_path),
        vocab_size=model.vocab_size,
        context_length=engine.context_length or model.max_position_embeddings,
        bad=bad,
    )


def _run(settings: GenerateSettings, records: list[PromptRecord], writer: Writer) -> None:
    """Start the engine, run every record through it, and tell on stderr how fast it went."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    from rollout import Engine

    console = Console(stderr=True)
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), Elapsed())
    speed = TextColumn("{task.fields[speed]}")
    with Engine(**_fields(settings.engine)) as engine:
        started = time.perf_counter()
        with Progress(
            *columns, speed, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            task = progress.add_task("", total=len(records), speed="")

            def on_result(index: int, samples: list[dict[str, Any]]) -> None:
                writer.write(index, records[index], samples)
                rate = writer.num_tokens / (time.perf_counter() - started)
                progress.update(task, advance=1, speed=f"{rate:,.0f} tokens/s")

            asyncio.run(_generate_all(engine, settings, records, on_result, writer.pretty))
        seconds = time.perf_counter() - started
    console.print(
        f"{writer.num_samples:,} samples, {writer.num_tokens:,} tokens in {seconds:.1f} s "
        f"({writer.num_tokens / seconds:,.0f} tokens/s)",
        style="dim",
    )


async def _generate_all(
    engine: Engine,
    settings: GenerateSettings,
    records: list[PromptRecord],
    on_result: Callable[[int, list[dict[str, Any]]], None],
    with_text: bool,
) -> None:
    """Keep up to `concurrency` prompts in the engine; the first that is refused ends the run."""
    room = asyncio.Semaphore(settings.concurrency)

    async def one(index: int, record: PromptRecord) -> None:
        async with room:
            result = await engine.async_generate(
                prompt=record.prompt,
                input_ids=record.input_ids,
                sampling_params=merged_params(settings.sampling, record),
                return_logprob=settings.return_logprob,
                return_text_in_logprobs=with_text,
            )
        on_result(index, result if isinstance(result, list) else [result])

    try:
        async with asyncio.TaskGroup() as tasks:
            for index, record in enumerate(records):
                tasks.create_task(one(index, record))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group


def _fields(config: EngineConfig) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
