"""`rollout top` looks at an engine or a pool by its address."""

import json
import threading

import pytest
import torch

from rollout import Engine, RolloutPool
from rollout.cli import top
from rollout.cli.app import run

OPTIONS = {"kv_cache_bytes": 4 << 20, "num_threads": 1, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module", params=["inline", "pool"])
def engine(request, folder):
    if request.param == "pool":
        served = RolloutPool(folder, num_replicas=1, listen="tcp://0.0.0.0:0", **OPTIONS)
    else:
        served = Engine(folder, **OPTIONS)
    with served:
        yield served


@pytest.fixture
def rollout(monkeypatch, capsys):
    """The console command in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out

    return call


def update(engine, folder, label):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine.update_weights_from_tensor(model, weight_version=label)


def test_one_look_shows_requests_tokens_versions_and_updates_with_their_phases(
    engine, folder, rollout
):
    update(engine, folder, "step 1")
    update(engine, folder, "step 2")
    text = rollout("top", engine.address, "--once", "--interval", 0.1)
    assert "'step 2' (number" in text and "serving" in text and "0 running" in text
    lines = [line.split() for line in text.splitlines()]
    [header] = [line for line in lines if "verify" in line]
    assert header == [
        "version",
        "label",
        "ago",
        "tensors",
        "stage",
        "copy",
        "verify",
        "pause",
        "total",
    ]
    assert any("step 1" in " ".join(line) for line in lines)
    # The key of the address, where it has one, is nobody's to see.
    assert "key" not in text


def test_facts_for_programs_count_tokens_and_tell_the_updates(engine, folder, rollout):
    update(engine, folder, "step 3")
    before = json.loads(rollout("top", engine.address, "--once", "--json", "--interval", 0.1))
    engine.generate(
        input_ids=[1, 2, 3],
        sampling_params={"max_new_tokens": 9, "temperature": 0.0, "ignore_eos": True},
    )
    after = json.loads(rollout("top", engine.address, "--once", "--json", "--interval", 0.1))
    # Its first token comes with the prompt's last step.
    assert after["num_decoded_tokens"] - before["num_decoded_tokens"] == 8
    assert after["syncs"][0]["label"] == after["weight_version"] == "step 3"
    assert [sync["version"] for sync in after["syncs"]] == sorted(
        (sync["version"] for sync in after["syncs"]), reverse=True
    )
    newest = after["syncs"][0]
    assert newest["total_s"] >= newest["copy_s"] > 0 and newest["ago_s"] >= 0
    assert 0 <= after["kv_use"] <= 1


def test_rates_are_of_the_time_between_two_looks(engine, rollout):
    done = threading.Event()

    def load():
        while not done.is_set():
            engine.generate(
                input_ids=[[i, 1] for i in range(8)],
                sampling_params={"max_new_tokens": 40, "ignore_eos": True},
            )

    thread = threading.Thread(target=load)
    thread.start()
    try:
        facts = json.loads(rollout("top", engine.address, "--once", "--json", "--interval", 1))
    finally:
        done.set()
        thread.join()
    assert facts["decoded_tokens_per_s"] > 0


def test_the_live_picture_is_redrawn_until_it_is_interrupted(engine, rollout, monkeypatch):
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    text = rollout("top", engine.address, "--interval", 2)
    assert naps == [2.0, 2.0, 2.0]
    assert "serving" in text and "KV cache" in text


def test_the_address_may_come_from_the_environment_and_a_wrong_one_is_one_line(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("ROLLOUT_ADDRESS", "tcp://127.0.0.1:1?key=short")
    with pytest.raises(SystemExit) as ended:
        run(["top", "--once"])
    error = capsys.readouterr().err
    assert (
        ended.value.code != 0
        and "not a key: got 5 characters" in error
        and "Traceback" not in error
    )


def test_another_life_of_the_engine_counts_from_zero(engine):
    import msgspec

    status = engine.status()
    first = top.Look("a", status)
    again = first.then(msgspec.structs.replace(status, engine_id="another", num_decoded_tokens=0))
    assert again.facts()["decoded_tokens_per_s"] is None


def test_a_look_reads_no_tokenizer(engine, rollout, monkeypatch):
    """The engine's folder may be none of this process's: started elsewhere, by a relative path."""
    asked, connect = [], Engine.connect

    def connecting(address, **options):
        asked.append(options)
        return connect(address, **options)

    monkeypatch.setattr(Engine, "connect", connecting)
    assert "serving" in rollout("top", engine.address, "--once", "--interval", 0.1)
    assert asked == [{"skip_tokenizer_init": True}]
