"""What cannot start is refused in the caller's process, before a child is started, in one typed line."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from rollout import Engine, RolloutActor
from rollout.engine.executors import rank_process
from rollout.engine.options import engine_config
from rollout.errors import CheckpointError, ConfigError


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "model")


@pytest.fixture(autouse=True)
def no_child(monkeypatch):
    """Nothing here may come as far as starting a process."""

    def start(*arguments, **options):
        raise AssertionError("a child was started")

    monkeypatch.setattr(rank_process.subprocess, "Popen", start)


def refused(kind, folder, *words, **options):
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        Engine(folder, **{"executor": "local", "kv_cache_bytes": 1 << 20, **options})
    message = str(caught.value)
    for word in ("got", "expected", *words):
        assert word in message, message
    assert "\n" not in message
    assert time.monotonic() - began < 20.0
    return message


def test_a_name_of_a_hub_is_told_to_be_downloaded():
    refused(ConfigError, "Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B", "model_path")


def test_a_path_that_is_not_there_or_a_file(folder, tmp_path):
    refused(ConfigError, str(tmp_path / "nowhere"), "model_path", "nowhere")
    refused(ConfigError, str(folder / "config.json"), "its folder")


def test_a_folder_without_weights(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    refused(CheckpointError, folder, "load_format='dummy'")


def test_a_folder_without_a_tokenizer(folder):
    for file in [*folder.glob("token*"), *folder.glob("vocab*")]:
        file.unlink()
    refused(CheckpointError, folder, "skip_tokenizer_init")


def test_a_tokenizer_path_that_is_not_there(folder):
    refused(ConfigError, folder, "tokenizer_path", tokenizer_path="/nowhere/at/all")


def test_a_configuration_of_an_unknown_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    refused(CheckpointError, folder, "clip")


@pytest.mark.parametrize("device", ["cuda:93", "tpu", "cpu:x", "meta"])
def test_a_device_that_is_not_there(folder, device):
    refused(ConfigError, folder, "device", device=device)


def test_a_dtype_that_is_not_served(folder):
    refused(ConfigError, folder, "dtype", "bfloat16", dtype="int8")


@pytest.mark.parametrize(
    "listen",
    ["localhost:80", "tcp://127.0.0.1", "tcp://127.0.0.1:http", "tcp://:1:99999", "ipc://"],
)
def test_an_address_that_is_none(folder, listen):
    refused(ConfigError, folder, "listen", "tcp://127.0.0.1:0", listen=listen)


@pytest.mark.parametrize("listen", ["tcp://\ud800:1", "ipc:///tmp/a\nb/c"])
def test_an_address_that_cannot_be_shown(folder, listen):
    refused(ConfigError, folder, "listen", "printable", listen=listen)


def test_ranks_that_do_not_divide_the_model(folder):
    refused(ConfigError, folder, "tp_size", tp_size=3)


def test_more_memory_than_there_is(folder):
    refused(ConfigError, folder, "kv_cache_bytes", "lower it", kv_cache_bytes=10**15)


def test_less_memory_than_two_blocks(folder):
    refused(ConfigError, folder, "kv_cache_bytes", "raise it", kv_cache_bytes=16)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 1e9])
@pytest.mark.parametrize(
    "name", ["start_timeout_s", "request_timeout_s", "pause_lease_s", "progress_timeout_s"]
)
def test_deadlines_that_are_none(folder, name, value):
    refused(ConfigError, folder, name, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 1 << 63), ("weight_version", "x" * 513), ("weight_version", "\ud800")],
)
def test_what_the_engine_could_not_tell_others(folder, name, value):
    refused(ConfigError, folder, name, **{name: value})


def test_a_log_level_that_is_none(folder):
    refused(ConfigError, folder, "log_level", log_level="LOUD")


def test_the_inline_engine_is_refused_the_same_things(folder):
    refused(ConfigError, folder, "device", device="tpu", executor="inline")


def test_what_can_start_is_not_refused(folder):
    with pytest.raises(AssertionError, match="a child was started"):
        Engine(folder, executor="local", kv_cache_bytes=1 << 20, listen="tcp://127.0.0.1:0")
    assert subprocess.Popen is not None


@pytest.mark.parametrize(
    ("options", "word"),
    [({"tp": 2}, "tp_size"), ({"dtype": "int8"}, "dtype"), ({"listen": "nowhere"}, "listen")],
)
def test_an_actor_is_refused_before_ray_starts_one(folder, options, word):
    with pytest.raises(ConfigError, match=word):  # There is no Ray here that could start it.
        RolloutActor.remote(folder, **options)


def test_a_folder_is_known_by_a_path_that_others_find_too(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = engine_config("model", {"tokenizer_path": Path("model")})
    assert config.model_path == config.tokenizer_path == str(tmp_path / "model")
    assert engine_config("a/name", {}).model_path == "a/name"


@pytest.mark.parametrize("name", ["max_running_requests", "tp_size", "ep_size"])
def test_a_number_that_no_engine_has_is_refused_with_its_range(folder, name):
    refused(ConfigError, folder, name, "at least 1", **{name: 0})


def test_more_requests_than_a_launch_has_rows_for_are_refused(folder):
    refused(
        ConfigError, folder, "max_running_requests", "at most 65535", max_running_requests=65536
    )
