"""An engine's process: how it starts from anywhere, how it ends when nobody wants it, and its last words."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from stopped import stop

import rollout
from rollout import Engine
from rollout.engine.executors.child_output import ChildOutput
from rollout.engine.loop.ranks import RankSpec
from rollout.errors import CheckpointError
from rollout.models.model_config import FAMILIES, ModelConfig
from weight_sync.errors import EngineDiedError

OPTIONS = {"kv_cache_bytes": 1 << 20, "executor": "local", "skip_tokenizer_init": True}
ASK = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(what, condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return str(tiny_checkpoint("qwen3"))


def run_script(code, cwd, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.usefixtures("started_anew")
def test_an_engine_that_is_dropped_ends_its_process(folder):
    engine = Engine(folder, **OPTIONS)
    pid = engine.status().pid
    del engine
    gc.collect()
    wait_until("the child's end", lambda: not is_alive(pid))


def test_an_engine_that_is_replaced_by_another_ends_its_process(folder):
    engine = Engine(folder, **OPTIONS)
    first = engine.status().pid
    engine = Engine(folder, **OPTIONS)  # As a notebook cell does that is run again.
    gc.collect()
    wait_until("the first child's end", lambda: not is_alive(first))
    assert len(engine.generate(**ASK)["output_ids"]) == 4
    engine.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_rank_is_told_of_a_checkpoint_is_what_is_in_it(tiny_checkpoint, family):
    model = ModelConfig.from_folder(tiny_checkpoint(family))
    told = msgspec.json.decode(msgspec.json.encode(RankSpec(model=model)), type=RankSpec)
    assert told.model == model and repr(told.model) == repr(model)


@pytest.mark.usefixtures("started_anew")
def test_a_rank_is_told_what_the_checkpoint_is_and_does_not_load_transformers(
    tiny_checkpoint, tmp_path, monkeypatch
):
    """Which would take it a second of processor time."""
    folder = tiny_checkpoint("glm4_moe")
    sampling = {**ASK["sampling_params"], "temperature": 0.0}
    with Engine(folder, **{**OPTIONS, "executor": "inline"}) as engine:
        expected = engine.generate(input_ids=[1, 2, 3], sampling_params=sampling)["output_ids"]
    broken = tmp_path / "transformers"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('a rank has loaded transformers')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Engine(folder, **OPTIONS) as engine:
        assert (
            engine.generate(input_ids=[1, 2, 3], sampling_params=sampling)["output_ids"] == expected
        )
    with pytest.raises(CheckpointError, match="a rank has loaded transformers"):  # where it must
        Engine(folder, **{**OPTIONS, "skip_tokenizer_init": False})


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_a_script_may_end_right_after_generate_without_a_shutdown(folder, tmp_path, executor):
    code = (
        f"from rollout import Engine\n"
        f"engine = Engine({folder!r}, **{ {**OPTIONS, 'executor': executor}!r})\n"
        f"print(engine.status().pid, len(engine.generate(**{ASK!r})['output_ids']))\n"
        "for _ in engine.generate(**{**" + repr(ASK) + ", 'stream': True}): break\n"
    )
    for _ in range(2):
        result = run_script(code, tmp_path)
        assert result.returncode == 0, (result.returncode, result.stderr)
        pid, num_tokens = map(int, result.stdout.split())
        assert num_tokens == 4
        wait_until("the end of the process", lambda pid=pid: not is_alive(pid))


def test_an_engine_starts_from_a_folder_whose_files_are_called_like_modules(folder, tmp_path):
    # The names that break: our own package, the standard library's, and a dependency's.
    for name in ("random.py", "tokenizers.py", "json.py"):
        (tmp_path / name).write_text("raise RuntimeError('this is not the module you want')\n")
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "__init__.py").write_text("raise RuntimeError('nor is this')\n")
    code = (
        "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"
        "from rollout import Engine\n"
        f"with Engine({folder!r}, **{OPTIONS!r}) as engine: print(engine.status().pid)\n"
    )
    result = run_script(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_an_engine_starts_where_only_the_parents_path_leads_to_the_package(folder, tmp_path):
    home = Path(rollout.__file__).resolve().parents[1]
    code = (
        f"import sys; sys.path[:] = [entry for entry in sys.path if entry and entry != {str(home)!r}]\n"
        f"sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"sys.path += [{str(home)!r}, {str(home / 'typings')!r}]\n"
        "from rollout import Engine\n"
        f"with Engine({folder!r}, **{OPTIONS!r}) as engine: print(engine.status().pid)\n"
    )
    result = run_script(code, tmp_path, PYTHONPATH="")
    assert result.returncode == 0, result.stderr


def test_an_error_about_a_dead_engine_has_its_signal_and_its_last_words(folder):
    with Engine(folder, **OPTIONS, log_level="INFO") as engine:
        os.kill(engine.status().pid, signal.SIGABRT)
        with pytest.raises(EngineDiedError) as caught:
            engine.generate(**ASK)
    message = str(caught.value)
    assert "SIGABRT" in message and "start a new Engine" in message
    assert "resolved configuration" in message  # What it had said last.


def test_a_stopped_engine_is_not_waited_for_at_the_end(folder):
    engine = Engine(folder, **OPTIONS)
    pid = engine.status().pid
    stop(pid)
    began = time.monotonic()
    engine.shutdown()
    assert time.monotonic() - began < 12.0  # Five seconds for an answer, one of grace; it took 15.
    assert not is_alive(pid)


def test_the_last_lines_of_a_child_are_kept_and_long_ones_cut(capfd):
    read_end, write_end = os.pipe()
    output = ChildOutput(os.fdopen(read_end, "rb"), "test")
    os.write(write_end, b"".join(b"line %d\n" % i for i in range(100)) + b"x" * 10_000 + b"\nend")
    os.close(write_end)
    words = output.last_words()
    output.close()
    assert "line 98" in words and "line 80" not in words and words.endswith("end")
    assert len(words) < 5000
    assert "line 3\n" in capfd.readouterr().err


@pytest.mark.parametrize("overlap", [False, True])
def test_one_line_about_throughput_comes_every_few_seconds_of_work(folder, caplog, overlap):
    options = {**OPTIONS, "executor": "inline", "log_interval_s": 3600.0, "overlap": overlap}
    with caplog.at_level("INFO", logger="rollout.throughput"), Engine(folder, **options) as engine:
        engine.generate(**ASK)
    (line,) = [record.getMessage() for record in caplog.records if "tokens/s" in record.message]
    assert line.startswith("version 0: 0 running, 0 waiting; ")


def test_an_engine_says_nothing_about_throughput_unless_asked(folder, caplog):
    with caplog.at_level("DEBUG"), Engine(folder, **{**OPTIONS, "executor": "inline"}) as engine:
        engine.generate(**ASK)
    assert not [record for record in caplog.records if "tokens/s" in record.getMessage()]
