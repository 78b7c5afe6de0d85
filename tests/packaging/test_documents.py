"""What the documents show can be done: their programs run, and their commands are the command line's.

Every block of README.md and of the pages in docs/ is run, read as commands, or has its reason in a table here.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import typer

from rollout import Engine
from rollout.cli.app import build_app
from rollout.server import ServerProcess, launch_server_process
from rollout.server.app import build_app as build_server
from rollout.server.config import ServerConfig
from rollout.server.state import ServerState
from weight_sync import FlattenedTensorBucket, WeightPublisher

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    *sorted(str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "docs").rglob("*.md")),
)
PATIENCE_S = 280.0
"""For a server to start where others work too."""
SMALL = {"kv_cache_bytes": 4 << 20, "num_threads": 1}

#: (page, first line of the block): why it is not run here.
NOT_RUN = {
    ("README.md", "import torch"): "test_readme.py runs it as a program",
    ("docs/gpu.md", "from trainers_integration.on_policy import OnPolicyForward"): (
        "needs a GPU; tests/parity/test_deterministic.py runs it in triton's interpreter"
    ),
    ("docs/ray.md", "import ray"): "needs a Ray cluster; tests/engine/test_ray.py has one",
    ("docs/ray.md", "group = ray.util.placement_group("): "as above, and GPUs",
    ("docs/ray.md", "from rollout import RolloutActor"): "as above",
    ("docs/ray.md", "from rollout import RolloutPool"): (
        "as above; examples/ray_pool.py is run by tests/trainers/test_examples.py"
    ),
    ("docs/spmd.md", "from weight_sync import SpmdPublisher"): (
        "needs ranks of a trainer; examples/spmd_trainer.py is run by tests/trainers/test_examples.py"
    ),
    ("docs/trainers/nemo_rl.md", "import ray"): (
        "needs NeMo-RL's workers; examples/nemo_rl_refit.py is run by tests/trainers/test_nemo_rl.py"
    ),
    ("docs/trainers/skyrl.md", "import torch"): (
        "needs SkyRL's workers; tests/trainers/test_skyrl.py makes and drives the trainer engine"
    ),
    ("docs/trainers/trl.md", "engine = Engine("): (
        "needs ranks of a trainer; tests/trainers/test_trl_ranks.py has them"
    ),
}
OF_OTHERS = ("diff", "yaml")
"""Languages of what changes in other people's scripts and settings."""
#: Blocks that show an output or a message.
SHOWN = {
    ("docs/running.md", "version 12: 256 running"),
    ("docs/running.md", "engine    process 4711"),
    ("docs/server.md", '{"tensors": [{"name"'),
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def first(self) -> str:
        return self.text.partition("\n")[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> Iterator[Block]:
    text = (CHECKOUT / page).read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PROGRAMS = [
    b
    for b in BLOCKS
    if b.language == "python"
    and not any(b.page == page and b.first.startswith(start) for page, start in NOT_RUN)
]
OTHERS = [block for block in BLOCKS if block.language not in ("python", *OF_OTHERS)]


def test_the_tables_of_what_is_not_run_name_blocks_that_are_there() -> None:
    unseen = [
        (page, start)
        for page, start in {*NOT_RUN, *SHOWN}
        if not any(b.page == page and b.first.startswith(start) for b in BLOCKS)
    ]
    assert unseen == []


# ---- programs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, **SMALL) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    options = {"port": 0, "api_keys": ("hush",)}
    with launch_server_process(checkpoint, server=options, timeout_s=PATIENCE_S, **SMALL) as server:
        yield server


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_a_program_runs(
    block: Block,
    request: pytest.FixtureRequest,
    checkpoint: Path,
    engine: Engine,
    model: Any,
    tmp_path: Path,
    free_port: int,
    tiny_checkpoint: Callable[..., Path],
) -> None:
    code = block.text
    if "http://10.0.0.5:30000" in code:
        code = code.replace("http://10.0.0.5:30000", request.getfixturevalue("server").url)
    for shown, here in (
        ('server={"port": 0})', f'server={{"port": 0}}, timeout_s={PATIENCE_S})'),
        ("path/to/checkpoint", str(checkpoint)),
        ("checkpoints/my-reward-model", str(tiny_checkpoint("qwen3", num_labels=1))),
        ("/home/me", str(tmp_path)),
        ("10.0.0.3:5555", f"127.0.0.1:{free_port}"),
        ("0.0.0.0:0", "127.0.0.1:0"),
    ):
        code = code.replace(shown, here)
    names: dict[str, Any] = {
        "Engine": Engine,
        "WeightPublisher": WeightPublisher,
        "path": str(checkpoint),
        "key": "hush",
        "engine": engine,
        "model": model,
        "buckets": buckets_of(model),
        "prompts": [[5, 9, 2], [7, 2]],
        "all_prompts": lambda: iter([[5, 9, 2], [7, 2]]),
    }
    try:
        program = compile(code, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        awaited = eval(program, names)
        if inspect.isawaitable(awaited):
            asyncio.run(awaited)
    finally:
        if isinstance(names["engine"], Engine) and names["engine"] is not engine:
            names["engine"].shutdown()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def buckets_of(model: Any) -> list[dict[str, Any]]:
    """All parameters, as trainers flatten them."""
    named = list(model.named_parameters())
    made = [FlattenedTensorBucket(named_tensors=part) for part in (named[:5], named[5:])]
    return [
        {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        for bucket in made
    ]


def test_the_request_that_the_readme_shows_is_answered(engine: Engine) -> None:
    """As curl sends it, which calls every body a form."""
    (line,) = [
        line
        for b in OTHERS
        if b.page == "README.md"
        for line in b.text.splitlines()
        if "curl" in line
    ]
    _, address, flag, body = shlex.split(line)
    assert flag == "-d"
    app = build_server(ServerState(engine, ServerConfig()))

    async def ask() -> httpx.Response:
        base = address.replace("localhost", "http://localhost")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            return await client.post(base, content=body, headers=kind)

    reply = asyncio.run(ask())
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["output_ids"]) <= 8


# ---- commands --------------------------------------------------------------------------------------------------------


#: Of whichever click typer was built on.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def parser() -> Callable[[list[str]], None]:
    """`parse(arguments)`: raises what the command line says of them, and runs nothing."""
    group = typer.main.get_command(build_app())

    def disarm(command: Any) -> None:
        command.callback = lambda **_: None
        for each in getattr(command, "commands", {}).values():
            disarm(each)

    disarm(group)
    return lambda arguments: group.main(arguments, "rollout", standalone_mode=False)


def words_of(line: str) -> list[list[str]]:
    """The `rollout` commands of a line, without what a shell would do with them, and without a remark behind them.

    "rollout a b | c": `rollout a b` and `rollout a c` or `rollout c`, of which one has to be a command.
    """
    line = re.split(r"\s{2,}|\s>\s|\s#\s", line[line.index("rollout ") :])[0]
    first, *others = line.split(" | ")
    words = shlex.split(first)[1:]
    return [words, *([*words[:1], *shlex.split(other)] for other in others)]


MENTIONED = "in a sentence:"
"""What a sentence names may leave out what it is not about."""


def said_commands() -> dict[str, list[list[str]]]:
    """Where a command is shown, and its words."""
    found: dict[str, list[list[str]]] = {}
    pages = (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md")))
    for page in (str(path.relative_to(CHECKOUT)) for path in pages):
        lines = [
            line for b in blocks_of(page) if b.language != "python" for line in b.text.splitlines()
        ]
        lines = [line for line in lines if re.match(r"(\$ )?([A-Z_]+=\S+ )*rollout ", line)]
        prose = re.sub(
            r"^```.*?^```", "", (CHECKOUT / page).read_text(), flags=re.DOTALL | re.MULTILINE
        )
        mentions = re.findall(r"`((?:[A-Z_]+=\S+ )?rollout [^`]+)`", prose.replace("\n", " "))
        for line in lines:
            found[f"{page}: {line}"] = words_of(line)
        for line in mentions:
            found[f"{page}, {MENTIONED} {line}"] = words_of(line)
    for name, epilog in epilogs(typer.main.get_command(build_app()), "rollout"):
        for line in epilog.splitlines():
            if re.match(r"(?:cat \S+ \| |[A-Z_]+=\S+ )?rollout ", line.strip()):
                found[f"{name} --help: {line.strip()}"] = words_of(line.strip())
    return {where: words for where, words in found.items() if "COMMAND" not in where}


def epilogs(command: Any, name: str) -> Iterator[tuple[str, str]]:
    yield name, inspect.cleandoc(command.epilog or "")
    for each in getattr(command, "commands", {}).values():
        yield from epilogs(each, f"{name} {each.name}")


def test_every_command_that_is_shown_is_one_with_these_options() -> None:
    parse = parser()
    wrong = []
    said = said_commands()
    assert len(said) > 60
    for where, commands in said.items():
        for words in commands:
            try:
                try:
                    parse(words)
                except UsageError:
                    if words is commands[0]:
                        raise
                    parse(words[1:])  # it stands for the whole command
            except (UsageError, typer.Exit) as error:
                if MENTIONED in where and re.search("^$|Missing|requires an argument", str(error)):
                    continue
                wrong.append(f"{where}: {words}: {error}")
    assert wrong == []


def test_every_block_that_is_no_program_shows_commands_or_an_output() -> None:
    other = [
        str(block)
        for block in OTHERS
        if not all(
            re.match(r"(rollout|make|mkdir|curl|pip|python3) ", line)
            for line in block.text.splitlines()
            if line
        )
        and not any(block.page == page and block.first.startswith(s) for page, s in SHOWN)
    ]
    assert other == []


def test_every_target_of_make_that_is_shown_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        name
        for page in PAGES
        for name in re.findall(
            r"^make ([a-z-]+)|`make ([a-z-]+)", (CHECKOUT / page).read_text(), re.MULTILINE
        )
        for name in name
        if name
    }
    assert shown and shown - targets == set()
