"""What the pages of HTTP trainers tell a user to type: `rollout serve`, then a script of examples/http_trainers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from versions import TOLERANCE, Reference, version_weights

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "http_trainers"
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module")
def new_weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a step of training would leave it."""
    at = tmp_path_factory.mktemp("step") / "step_1"
    at.mkdir()
    save_file(version_weights(folder, 1), at / "model.safetensors")
    return at


@contextmanager
def served(folder: Path, *words: str) -> Iterator[str]:
    """`rollout serve` in a terminal of its own, until Ctrl-C; it must end by itself, and well."""
    command = [sys.executable, "-m", "rollout.cli", "serve", "--model", str(folder), "--port", "0"]
    command += ["--set", "engine.kv_cache_bytes=4194304", "--set", "engine.num_threads=1", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("serving at ")), "")
        assert line, "the server has ended"
        yield line.removeprefix("serving at ").strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def listen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ipc://{tmp_path_factory.mktemp('s')}/engine.sock"


@pytest.fixture(scope="module")
def url(folder: Path, listen: str) -> Iterator[str]:
    with served(folder, "--set", f"engine.listen={listen}") as url:
        yield url


@pytest.mark.parametrize("name", ["slime", "areal", "skyrl", "prime_rl"])
def test_a_step_of_each_trainer_against_a_server_as_a_user_starts_it(
    name: str, url: str, listen: str, folder: Path, new_weights: Path
) -> None:
    httpx.post(f"{url}/weights_checker", json={"action": "reset_tensors"}, timeout=120)
    first = {"model_path": str(folder), "weight_version": "the start"}
    httpx.post(f"{url}/update_weights_from_disk", json=first, timeout=120).raise_for_status()
    words = [sys.executable, str(SCRIPTS / f"{name}.py"), url, str(new_weights)]
    if name == "skyrl":
        words += ["--address", listen]
    ran = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    found = dict(re.findall(r"^(before|after)[^{]*(\{.*\})$", ran.stdout, re.MULTILINE))
    assert set(found) == {"before", "after"}, ran.stdout
    reference = Reference(folder)
    for number, moment in enumerate(("before", "after")):
        tokens, logprobs = (listed(found[moment], key) for key in ("tokens", "logprobs"))
        assert 0 < len(tokens) == len(logprobs) <= 8
        expected = reference.at(number).logprobs(PROMPT, [int(token) for token in tokens])
        gap = (torch.tensor(logprobs) - torch.tensor(expected)).abs().max()
        assert float(gap) < TOLERANCE, (moment, ran.stdout)


def listed(text: str, key: str) -> list[float]:
    """The numbers of one list in what a script has printed."""
    (row,) = re.findall(rf"'{key}': \[([^\]]*)\]", text)
    return [float(value) for value in row.split(",")]
