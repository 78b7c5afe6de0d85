"""`rollout generate` and `rollout info` on a real checkpoint, as a user calls them."""

import io
import json
from dataclasses import dataclass

import pytest

from rollout import Engine
from rollout.cli.app import run
from rollout.models.model_config import FAMILIES


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def rollout(monkeypatch, capsys):
    """The console command in this process, which has torch loaded already."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(ended.value.code, captured.out, captured.err)

    return call


def samples(result) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_prompts_from_arguments_are_completed_in_order(rollout, checkpoint):
    result = rollout("generate", "-m", checkpoint, "-n", 2, "--max-new-tokens", 5, "ab", "cd")
    lines = samples(result)
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        *(("ab", 0), ("ab", 1), ("cd", 0), ("cd", 1)),
    ]
    assert all(1 <= len(line["output_ids"]) <= 5 for line in lines)
    assert "4 samples" in result.stderr
    assert "tokens/s" in result.stderr


def test_a_file_brings_prompts_and_keeps_its_other_keys(rollout, checkpoint, tmp_path):
    records = [
        {"prompt": "abc", "answer": "xyz", "sampling_params": {"max_new_tokens": 2}},
        {"input_ids": [5, 6, 7], "answer": 3},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--set", "sampling.ignore_eos=true", "--max-new-tokens", 4, "--logprobs")
    result = rollout("generate", "-m", checkpoint, "-i", source, "-o", target, *options)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["xyz", 3]
    assert [len(line["output_ids"]) for line in lines] == [2, 4]
    assert [len(line["meta_info"]["output_token_logprobs"]) for line in lines] == [2, 4]


def test_standard_input_has_a_prompt_per_line_and_a_seed_reproduces(rollout, checkpoint):
    def once():
        options = ("--seed", 7, "--max-new-tokens", 8, "--format", "jsonl")
        return samples(rollout("generate", "-m", checkpoint, *options, stdin="ab\n\ncd\n"))

    first, second = once(), once()
    assert [line["prompt"] for line in first] == ["ab", "cd"]
    assert [line["output_ids"] for line in first] == [line["output_ids"] for line in second]


def test_pretty_output_is_for_people(rollout, checkpoint):
    result = rollout("generate", "-m", checkpoint, "--format", "pretty", "ab")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("── ab  [")


def test_settings_come_from_a_file_and_options_win(rollout, checkpoint, tmp_path):
    config = tmp_path / "my.toml"
    config.write_text(
        f'[engine]\nmodel_path = "{checkpoint}"\n'
        "[sampling]\nmax_new_tokens = 9\nignore_eos = true\n"
    )
    (line,) = samples(rollout("generate", "--config", config, "ab"))
    assert len(line["output_ids"]) == 9
    (line,) = samples(rollout("generate", "--config", config, "--max-new-tokens", 3, "ab"))
    assert len(line["output_ids"]) == 3


def test_printed_settings_are_a_file_that_reads_back(rollout, tmp_path):
    printed = rollout("generate", "--print-config", "--temperature", "0.5")
    config = tmp_path / "my.toml"
    config.write_text(printed.stdout)
    assert "temperature = 0.5" in printed.stdout
    assert "# Longest prompt plus output in tokens" in printed.stdout
    again = rollout("generate", "--print-config", "--config", config)
    assert again.stdout == printed.stdout


def test_printed_settings_hold_no_secrets(rollout, tmp_path):
    printed = rollout(
        *("serve", "--print-config", "--api-key", "hush-1", "--api-key", "hush-2"),
        *("--admin-api-key", "hush-3", "--set", "server.ssl_keyfile_password=hush-4"),
        *("--set", "address=tcp://10.0.0.3:5?key=hush-5", "--set", "server.port=8123"),
    )
    assert printed.returncode == 0, printed.stderr
    assert "hush" not in printed.stdout
    assert "# api_keys = ... (given, not shown)" in printed.stdout
    config = tmp_path / "my.toml"
    config.write_text(printed.stdout)
    again = rollout("serve", "--print-config", "--config", config)
    assert "port = 8123" in again.stdout
    assert "(given" not in again.stdout


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"promt": "a"}', ("line 1", "promt", "prompt, input_ids, messages")),
        ('{"prompt": "a", "input_ids": [1]}', ("line 1", "prompt and input_ids", "exactly one")),
        ('{"prompt": 3}', ("line 1", "str", "int")),
        ('{"prompt": ', ("line 1", "not valid JSON")),
        ('{"prompt": "a", "sampling_params": {"temprature": 1}}', ("'temperature'",)),
        ("", ("no prompts",)),
    ],
)
def test_an_input_that_cannot_be_run_is_one_line_of_error(rollout, checkpoint, line, parts):
    result = rollout("generate", "-m", checkpoint, "-i", "-", stdin=f"{line}\n")
    assert result.returncode == 1
    assert all(part in result.stderr for part in parts), result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_without_a_model_is_one_line_of_error(rollout, tmp_path):
    result = rollout("generate", "-m", tmp_path, "ab")
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr


def test_info_tells_sizes_and_resolved_settings(rollout, checkpoint):
    result = rollout("info", checkpoint, "--json", "--set", "engine.context_length=128")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["model"]["family"] == "qwen3"
    assert facts["model"]["num_layers"] == 2
    assert facts["engine"]["context_length"] == 128
    assert facts["engine"]["dtype"] == "float32"
    assert facts["tensors"]["model.norm.weight"] == [64]
    total = sum(product(shape) for shape in facts["tensors"].values())
    assert facts["model"]["num_parameters"] == total
    assert "lm_head.weight" not in facts["tensors"]


def test_info_says_what_fits_on_a_gpu_that_is_not_there(rollout, checkpoint):
    result = rollout("info", checkpoint, "--json", "--memory", "2e6")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    memory, engine = facts["memory of each rank"], facts["engine"]
    assert memory["weight_bytes"] == facts["model"]["parameter_bytes"]
    assert (engine["device"], engine["attention_backend"]) == ("cuda", "triton")
    assert (engine["block_size"], engine["overlap"]) == (64, True)
    budget = int(0.85 * 2e6) - memory["weight_bytes"]
    assert (
        0 <= budget - memory["kv_cache_bytes"] < engine["block_size"] * memory["kv_bytes_per_token"]
    )
    # Two layers of keys and values, float32.
    assert memory["kv_bytes_per_token"] == 2 * 2 * (
        facts["model"]["num_kv_heads"] * facts["model"]["head_dim"] * 4
    )
    context = engine["context_length"]
    assert memory[f"requests of {context:,} tokens"] == memory["kv_tokens"] // context
    refused = rollout("info", checkpoint, "--memory", "1e5")
    assert refused.returncode == 1
    assert "KV pool: got 0 bytes beside" in refused.stderr
    assert "with 100,000 free on the GPU" in refused.stderr
    assert len(refused.stderr.splitlines()) <= 3


@pytest.mark.parametrize("memory", ["80", "-1", "nan", "inf"])
def test_memory_that_is_no_number_of_bytes_is_one_line_of_error(rollout, checkpoint, memory):
    result = rollout("info", checkpoint, "--memory", memory)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert f"--memory: got {memory}" in result.stderr
    assert "80e9" in result.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_checkpoint_of_every_family_generates(rollout, tmp_path, family):
    made = rollout("tiny", tmp_path / "new" / "model", "--family", family)
    assert made.returncode == 0, made.stderr
    assert sum(file.stat().st_size for file in (tmp_path / "new" / "model").iterdir()) < 2e6
    options = ("--chat", "--max-new-tokens", 3, "--set", "sampling.ignore_eos=true")
    (line,) = samples(rollout("generate", "-m", tmp_path / "new" / "model", *options, "Häuser?"))
    assert len(line["output_ids"]) == 3


def test_a_tiny_classifier_scores(rollout, tmp_path):
    assert rollout("tiny", tmp_path, "--labels", 2).returncode == 0
    with Engine(tmp_path) as engine:
        ((_, _),) = engine.classify("abc")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("{}", "--family", "qwen4"), ("--family: got 'qwen4'", "did you mean 'qwen")),
        (("{}/file",), ("FOLDER", "there already", "name another")),
        (("/proc/nobody",), ("FOLDER", "can be written to")),
    ],
)
def test_a_tiny_checkpoint_overwrites_nothing(rollout, tmp_path, arguments, parts):
    (tmp_path / "file").write_text("mine")
    result = rollout("tiny", *(argument.format(tmp_path) for argument in arguments))
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert all(part in result.stderr for part in parts), result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def product(shape) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def test_info_for_people_lists_tensors_when_asked(rollout, checkpoint):
    assert "model.norm.weight" not in rollout("info", checkpoint).stdout
    assert "model.norm.weight  [64]" in rollout("info", checkpoint, "--tensors").stdout
    imagined = rollout("info", checkpoint, "--memory", "80e9", "--set", "engine.seed=1234").stdout
    assert "memory of each rank, on an imagined GPU with 80.00 GB free" in imagined
    assert any(line.split() == ["seed", "1234"] for line in imagined.splitlines())
    assert "tokens  256 at once" in imagined
    assert "RopeConfig(" not in imagined


# ---- long runs -------------------------------------------------------------------------------------------------------


def write_prompts(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_all_prompts_are_checked_first_and_errors_name_file_and_line(rollout, checkpoint, tmp_path):
    source = write_prompts(
        tmp_path / "in.jsonl",
        {"prompt": "ab"},
        {"input_ids": [1, 10**6]},
        {"prompt": "ab", "sampling_params": {"temprature": 1}},
        {"nothing": 1},
        {"input_ids": [1] * 5000},
    )
    result = rollout("generate", "-m", checkpoint, "-i", source, "-o", tmp_path / "out.jsonl")
    assert result.returncode == 1
    for words in ("line 2: input_ids", "line 3: sampling parameters", "line 4", "line 5: got 5000"):
        assert f"in.jsonl, {words}" in result.stderr.replace("\n", " "), result.stderr
    assert "line 1" not in result.stderr and "--skip-bad" in result.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "ab", "note": "\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"input_ids": [' + "1" * 5000 + "]}", "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
    ],
)
def test_a_line_that_could_not_be_written_again_is_refused_before_the_run(
    rollout, checkpoint, tmp_path, line, says
):
    (tmp_path / "in.jsonl").write_text(f"ab\n{line}\n")
    result = rollout("generate", "-m", checkpoint, "-i", tmp_path / "in.jsonl")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "in.jsonl, line 2" in result.stderr and says in result.stderr.replace("\n", " ")


def test_bad_prompts_are_skipped_and_named_on_request(rollout, checkpoint, tmp_path):
    source = write_prompts(
        tmp_path / "in.jsonl", {"prompt": "ab"}, {"input_ids": []}, {"prompt": "cd"}
    )
    options = ("--skip-bad", "--max-new-tokens", 2, "--format", "jsonl")
    result = rollout("generate", "-m", checkpoint, "-i", source, *options)
    assert [line["prompt"] for line in samples(result)] == ["ab", "cd"]
    assert "skipped: " in result.stderr and "line 2" in result.stderr


def test_results_have_their_name_only_when_they_are_complete_and_can_be_resumed(
    rollout, checkpoint, tmp_path, monkeypatch
):
    from rollout.cli.output import Writer

    records = [
        {"prompt": text, "sampling_params": {"n": n}}
        for text, n in (("ab", 2), ("cd", 1), ("ef", 3))
    ]
    source, target = write_prompts(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl"
    call = ("generate", "-m", checkpoint, "-i", source, "--max-new-tokens", 3, "--seed", 3)
    whole = rollout(*call, "-o", tmp_path / "whole.jsonl")
    assert whole.returncode == 0, whole.stderr

    emit = Writer._emit

    def dies_at_the_second(self, record, results):
        if record.prompt == "cd":
            self._out.write('{"prompt": "cd", "sam')
            raise OSError("no space left on device")
        emit(self, record, results)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "_emit", dies_at_the_second)
        ended = rollout(*call, "-o", target)
        assert (
            ended.returncode == 1 and "no space left" in ended.stderr and "--resume" in ended.stderr
        )
    assert not target.exists() and (tmp_path / "out.jsonl.partial").exists()

    refused = rollout(*call, "-o", target)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    resumed = rollout(*call, "-o", target, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "1 of 3 prompts are done" in resumed.stderr
    assert not (tmp_path / "out.jsonl.partial").exists()

    def essence(path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["prompt"], line["sample"], line["output_ids"]) for line in lines]

    assert essence(target) == essence(tmp_path / "whole.jsonl")


def test_unfinished_results_of_other_prompts_are_not_taken_for_these(rollout, checkpoint, tmp_path):
    for line in ('{"prompt": "other", "sample": 0}', "7", "no JSON", "[" * 100_000):
        (tmp_path / "out.jsonl.partial").write_text(f"{line}\n")
        target = tmp_path / "out.jsonl"
        result = rollout("generate", "-m", checkpoint, "-o", target, "--resume", "ab")
        assert result.returncode == 1 and "other prompts" in result.stderr


def test_an_output_that_cannot_be_written_is_refused_at_once(rollout, checkpoint, tmp_path):
    for target in (tmp_path, tmp_path / "nowhere" / "out.jsonl"):
        result = rollout("generate", "-m", checkpoint, "-o", target, "ab")
        assert result.returncode == 1 and "--output" in result.stderr


def test_a_chat_without_a_template_is_refused_in_one_line(rollout, checkpoint):
    result = rollout("generate", "-m", checkpoint, "--chat", "ab")
    assert result.returncode == 1
    assert "chat template" in result.stderr and "Traceback" not in result.stderr


def test_log_probabilities_are_shown_to_people_too(rollout, checkpoint):
    options = ("--format", "pretty", "--logprobs", "--max-new-tokens", 3)
    result = rollout("generate", "-m", checkpoint, *options, "ab")
    assert result.returncode == 0, result.stderr
    assert "log-probabilities: -" in result.stdout


def test_the_version_is_an_option_too(rollout):
    result = rollout("--version")
    assert result.returncode == 0 and result.stdout.startswith("rollout-sync ")
