"""TRL's own GRPO and RLOO trainers, generating with an engine by `attach`: the real library, a tiny model."""

import subprocess
import sys

import pytest
import torch
from trl_support import (
    DIFFERENCE,
    NUM_DIGITS,
    data,
    load,
    logged,
    make_trainer,
    poison,
    right_answers,
)

from rollout import Engine, RolloutPool
from rollout.errors import ConfigError, InvalidRequestError, NonFiniteWeightsError, RolloutError
from trainers_integration.trl import attach, rollout_func
from weight_sync import fingerprint

pytestmark = pytest.mark.trl

TOLERANCE = 1e-4


def mean(values):
    return sum(values) / len(values)


def trained(trainer):
    trainer.train()
    return trainer


def test_grpo_learns_from_the_engine_and_not_without_new_weights(task, engine, tmp_path):
    folder, examples = task
    args = {"per_device_train_batch_size": 256, "max_steps": 16, "output_dir": str(tmp_path)}
    before = right_answers(load(folder), examples)

    trainer = make_trainer("GRPO", folder, data(examples), args=args)
    attach(trainer, engine)
    trained(trainer)
    after = right_answers(trainer.model, examples)
    assert after > before + 0.05, (before, after)  # 0.105 with any of three seeds, 0.004 apart
    assert max(logged(trainer, DIFFERENCE)) < TOLERANCE
    assert max(logged(trainer, "sampling/importance_sampling_ratio/max")) < 1 + TOLERANCE

    control = make_trainer("GRPO", folder, data(examples), args={**args, "max_steps": 3})
    generation = attach(control, engine)
    generation.sync_weights()
    served = engine.weights_fingerprint()
    generation.sync_weights = lambda: None
    trained(control)
    assert engine.weights_fingerprint() == served != fingerprint(control.model)
    differences = logged(control, DIFFERENCE)
    assert differences[0] < TOLERANCE and min(differences[1:]) > 10 * TOLERANCE


def test_the_engine_serves_what_the_trainer_has_and_every_step_is_one_version(task, engine):
    folder, examples = task
    trainer = make_trainer("GRPO", folder, data(examples))
    attach(trainer, engine)
    before = engine.status().version
    trained(trainer)
    assert engine.status().version == before + 3  # steps 0, 1 and 2
    assert engine.status().weight_version == "step 2"
    trainer.evaluate(data(examples, split="heldout"))
    assert engine.weights_fingerprint() == fingerprint(trainer.model)
    trainer.train()  # global_step begins again at 0, and the parameters do not
    assert max(logged(trainer, DIFFERENCE)) < TOLERANCE


@pytest.mark.parametrize(
    "args",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 16},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 3, "per_device_train_batch_size": 16},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
        {"vllm_importance_sampling_mode": "sequence_mask"},
    ],
    ids=lambda args: next(iter(args)),
)
def test_the_numbers_agree_however_the_steps_are_cut(task, engine, args):
    folder, examples = task
    trainer = make_trainer("GRPO", folder, data(examples), args=args)
    attach(trainer, engine)
    differences = logged(trained(trainer), DIFFERENCE)
    assert differences and max(differences) < TOLERANCE


def test_conversations_and_evaluation_with_another_number_of_samples(task, engine):
    folder, examples = task
    heldout = data(examples, conversational=True, split="heldout")
    trainer = make_trainer(
        "GRPO",
        folder,
        data(examples, conversational=True),
        eval_dataset=heldout,
        args={"num_generations_eval": 2, "eval_strategy": "steps", "eval_steps": 2},
    )
    attach(trainer, engine)
    trained(trainer)
    assert max(logged(trainer, DIFFERENCE)) < TOLERANCE
    assert max(logged(trainer, f"eval_{DIFFERENCE}")) < TOLERANCE
    assert logged(trainer, "eval_reward")


def test_rloo_trains_on_the_engines_completions(task, engine):
    folder, examples = task
    args = {"per_device_train_batch_size": 128, "max_steps": 12}
    trainer = make_trainer("RLOO", folder, data(examples), args=args)
    attach(trainer, engine)
    rewards = logged(trained(trainer), "reward")
    assert min(rewards) > 0.05, rewards  # poisoned weights get nothing
    assert engine.status().weight_version == "step 11"


def test_adapters_are_merged_for_the_engine_and_taken_out_again(task, engine):
    from peft import LoraConfig

    folder, examples = task
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    trainer = make_trainer(
        "GRPO", folder, data(examples), peft_config=lora, args={"learning_rate": 0.02}
    )
    base = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    kept = base.detach().clone()
    attach(trainer, engine)
    differences = logged(trained(trainer), DIFFERENCE)
    assert max(differences) < TOLERANCE
    assert torch.equal(base, kept)
    trainer.vllm_generation.sync_weights()
    assert torch.equal(base, kept)
    ids = [3, 4, 5, 6, 2, 7]
    with torch.no_grad():
        merged = trainer.model.merge_and_unload()
        want = torch.log_softmax(merged(torch.tensor([ids])).logits[0, :-1], -1)
    got = engine.sequence_logprobs([ids])[0][1:]
    assert got == pytest.approx([want[i, t].item() for i, t in enumerate(ids[1:])], abs=TOLERANCE)


def test_a_tool_is_called_and_its_answer_is_no_token_of_the_policy(task, engine, monkeypatch):
    """TRL renders the tool's answer and generates again, for each sample from its own tokens."""
    from transformers import AutoTokenizer

    folder, examples = task
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = "as parsed below"
    calls = []

    def digits() -> str:
        """Some digits.

        Returns:
            Digits.
        """
        calls.append(1)
        return "1234="

    def parse(tokenizer, ids, prefix, tools):
        message = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        if len(prefix) == NUM_DIGITS + 1:  # the prompt alone: the first turn
            function = {"name": "digits", "arguments": {}}
            message["tool_calls"] = [{"type": "function", "function": function}]
        return message

    monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", parse)
    trainer = make_trainer(
        "GRPO",
        folder,
        data(examples, conversational=True),
        tokenizer=tokenizer,
        tools=[digits],
        args={"max_completion_length": 18},
    )
    attach(trainer, engine)
    trained(trainer)
    assert len(calls) == 3 * 32
    assert logged(trainer, "tools/call_frequency") == [1.0] * 3
    assert max(logged(trainer, DIFFERENCE)) < TOLERANCE


def test_a_pool_generates_for_a_trainer(task):
    folder, examples = task
    trainer = make_trainer("GRPO", folder, data(examples))
    with RolloutPool(folder, num_replicas=2, seed=0, num_threads=1) as pool:
        poison(pool)
        attach(trainer, pool)
        trained(trainer)
        assert pool.weight_version == "step 2"
    assert max(logged(trainer, DIFFERENCE)) < TOLERANCE


# ---- what is refused -----------------------------------------------------------------------------


def test_another_trainer_another_version_and_other_options_are_refused(task, engine, monkeypatch):
    folder, examples = task
    trainer = make_trainer("GRPO", folder, data(examples))
    with pytest.raises(ConfigError, match="GRPOTrainer or RLOOTrainer"):
        attach(object(), engine)
    with pytest.raises(ConfigError, match="no engine on rank 0"):
        attach(trainer, None)
    with pytest.raises(ConfigError, match="got dict for the engine"):
        attach(trainer, {})
    trainer.use_vllm = True
    with pytest.raises(ConfigError, match="use_vllm=True"):
        attach(trainer, engine)
    trainer.use_vllm = False

    def other(self, *arguments):
        return None

    monkeypatch.setattr(type(trainer), "_generate_single_turn", other)
    with pytest.raises(ConfigError, match=r"'_last_loaded_step'.*pip install 'trl==1\.16"):
        attach(trainer, engine)
    monkeypatch.undo()
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with pytest.raises(ConfigError, match=r"got trl 1\.17\.0, expected 1\.16.*pip install"):
        attach(trainer, engine)
    with pytest.raises(ConfigError, match=r"got trl 1\.17\.0"):
        rollout_func(engine)


def test_prompts_that_are_not_grouped_are_refused(task, engine):
    folder, examples = task
    generation = attach(make_trainer("GRPO", folder, data(examples)), engine)
    generation.sync_weights()
    with pytest.raises(InvalidRequestError, match="got one 1 times in a row"):
        generation.generate([[3, 2], [4, 2], [3, 2], [4, 2]], None, 2)
    with pytest.raises(InvalidRequestError, match="got images"):
        generation.generate([[3, 2]], [object()], 1)


class Meddled:
    """An engine whose answers are changed on their way."""

    def __init__(self, engine, change):
        self._engine, self._change = engine, change

    def generate(self, **call):
        results = self._engine.generate(**call)
        for result in results:
            self._change(result)
        return results


def shorten(result):
    result["meta_info"]["output_token_logprobs"].pop()


def empty(result):
    result["output_ids"] = []
    result["meta_info"]["output_token_logprobs"] = []


def abort(result):
    result["meta_info"]["finish_reason"] = {"type": "abort", "message": "somebody wanted it"}


@pytest.mark.parametrize(
    ("change", "says"),
    [(shorten, "do not belong"), (empty, "without tokens"), (abort, "somebody wanted it")],
)
def test_answers_that_trl_would_train_wrongly_on_are_refused(task, engine, change, says):
    folder, examples = task
    generation = attach(make_trainer("GRPO", folder, data(examples)), engine)
    generation.sync_weights()
    generation.engine = Meddled(engine, change)
    with pytest.raises(RolloutError, match=says):
        generation.generate([[3, 4, 2]] * 4, None, 4)


def test_completions_of_an_older_version_are_refused(task, engine):
    folder, examples = task
    generation = attach(make_trainer("GRPO", folder, data(examples)), engine)
    generation.sync_weights()

    def age(result):
        result["meta_info"]["weight_versions"][0]["number"] -= 1

    generation.engine = Meddled(engine, age)
    with pytest.raises(RolloutError, match="too old"):
        generation.generate([[3, 4, 2]] * 4, None, 4)


def test_weights_that_are_no_numbers_end_the_run_and_not_the_engine(task, engine):
    folder, examples = task
    trainer = make_trainer("GRPO", folder, data(examples))
    attach(trainer, engine)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteWeightsError):
        trainer.train()
    assert engine.status().weight_version == "poison"
    assert engine.generate(input_ids=[3, 2], sampling_params={"max_new_tokens": 2})["output_ids"]


# ---- more processes ------------------------------------------------------------------------------

SERVE = """
import sys
from rollout import Engine
with Engine(sys.argv[1], seed=0, num_threads=1) as engine:
    print(engine.address, flush=True)
    sys.stdin.read()
"""


def test_a_trainer_uses_an_engine_of_another_process_by_its_address(task):
    folder, examples = task
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().strip()
        with Engine.connect(address) as engine:
            poison(engine)
            trainer = make_trainer("GRPO", folder, data(examples))
            generation = attach(trainer, address)
            trained(trainer)
            assert engine.weight_version == "step 2"
            generation.close()
        assert max(logged(trainer, DIFFERENCE)) < TOLERANCE
    finally:
        process.stdin.close()
        assert process.wait(60) == 0
