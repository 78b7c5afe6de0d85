"""TRL's own AsyncGRPOTrainer with this engine's worker and weight transfer: the real library, a tiny model."""

import copy
import queue
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl_support import (
    NUM_DIGITS,
    data,
    exact,
    load,
    logged,
    noise,
    right_answers,
    wait_until,
)
from trl_support import async_settings as settings

from rollout import Engine
from rollout.errors import ConfigError, ManifestMismatch, RolloutError
from trainers_integration.trl import RolloutWorker, WeightTransfer
from trainers_integration.trl.groups import PolicyVersions, advantages_of
from weight_sync import fingerprint

pytestmark = pytest.mark.trl

TOLERANCE = 1e-4
CALLS = (
    *("init_weight_transfer", "pause", "send_weights", "resume", "destroy"),
    *("start", "stop", "update_model_version"),
)


def attention(query, key, value, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, **_):
    """What the GPU kernel behind TRL's packed rows computes: each segment attends to its own path."""
    parts = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        heads = query.shape[1] // key.shape[1]
        q = query[q0:q1].transpose(0, 1)
        k = key[k0:k1].transpose(0, 1).repeat_interleave(heads, 0)
        v = value[k0:k1].transpose(0, 1).repeat_interleave(heads, 0)
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=softmax_scale
            ).transpose(0, 1)
        )
    return torch.cat(parts)


@pytest.fixture
def on_cpu(monkeypatch):
    """TRL's trainer asks for a kernel and for the peak of a GPU; everything else of it is as it is."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    kernels = SimpleNamespace(flash_attn_varlen_func=attention)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernels)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)


def make(
    task, engine, *, transfer=None, reward_funcs=exact, conversational=True, peft=None, **options
):
    """(trainer, worker, transfer)"""
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    folder, examples = task
    args = settings(folder, **options)
    dataset = data(examples, conversational=conversational)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    worker = RolloutWorker(
        engine, reward_funcs, train_dataset=dataset, args=args, processing_class=tokenizer
    )
    transfer = transfer or WeightTransfer(engine)
    trainer = AsyncGRPOTrainer(
        model=str(folder),
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        rollout_worker=worker,
        weight_transfer=transfer,
        peft_config=peft,
    )
    return trainer, worker, transfer


def note_calls(target, calls):
    for name in CALLS:
        if not hasattr(target, name):
            continue
        method = getattr(target, name)

        def noted(*arguments, _method=method, _name=name):
            version = arguments[0] if _name == "update_model_version" else None
            calls.append(_name if version is None else f"version {version}")
            return _method(*arguments)

        setattr(target, name, noted)


def test_an_asynchronous_run_calls_in_order_and_trains_on_exact_ratios(task, engine, on_cpu):
    threads = threading.active_count()
    trainer, worker, transfer = make(task, engine, max_staleness=0, max_steps=3)
    assert trainer.args.token_budget == engine.status().resolved["context_length"]
    calls = []
    note_calls(worker, calls)
    note_calls(transfer, calls)
    samples, policies = [], []
    put, send = worker.rollout_buffer.put_nowait, transfer.send_weights
    worker.rollout_buffer.put_nowait = lambda sample: (put(sample), samples.append(sample))
    transfer.send_weights = lambda tensors: (
        policies.append(copy.deepcopy(trainer.model.state_dict())),
        send(tensors),
    )
    trainer.train()

    update = ["pause", "send_weights", "resume"]
    assert calls == [
        *("init_weight_transfer", *update, "version 1", "start"),
        *(*update, "version 2", *update, "version 3", *update, "version 4"),
        *("stop", "destroy"),
    ]
    assert logged(trainer, "sample/staleness_max") == [0.0] * 3
    # TRL fetches a batch ahead: what it counts as fresh is an update older when it trains on it, but for the first.
    assert abs(logged(trainer, "ratio")[0] - 1) < TOLERANCE
    assert abs(logged(trainer, "kl")[0]) < TOLERANCE
    assert len(samples) > 3 * 16
    for policy, parameters in enumerate(policies, start=1):
        model = load(task[0])
        model.load_state_dict(parameters)
        check_first_tokens(model, [s for s in samples if s.model_version == policy])
    assert sum(logged(trainer, "sample/dropped_stale_total")) > 0  # what was under way at an update
    assert np.mean(logged(trainer, "reward")) > 0.05  # poisoned weights get nothing
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert engine.weights_fingerprint() == fingerprint(dict(model.named_parameters()))
    assert engine.weight_version == "update 4"
    assert engine.status().num_running == 0
    # TRL's own logger of traces stays, a daemon; nothing of ours does.
    assert not [t.name for t in threading.enumerate() if t.name == "trl-rollouts"]
    assert threading.active_count() <= threads + 2


def check_first_tokens(model, samples):
    """The first token of each was drawn by this policy, whatever came after."""
    for sample in samples:
        start = int(sample.completion_mask.argmax())
        ids = torch.tensor(sample.input_ids[None, : start + 1])
        with torch.no_grad():
            want = torch.log_softmax(model(ids).logits[0, start - 1], -1)[ids[0, start]]
        assert sample.old_log_probs[start] == pytest.approx(want.item(), abs=TOLERANCE)


def test_stale_samples_are_used_up_to_the_limit_and_the_policy_learns(task, engine, on_cpu):
    trainer, _, _ = make(
        task,
        engine,
        max_steps=12,
        lr_scheduler_type="constant",
        per_device_train_batch_size=256,
        conversational=False,
        token_budget=0,
    )
    before = right_answers(load(task[0]), task[1])
    trainer.train()
    assert max(logged(trainer, "sample/staleness_max")) <= 2
    assert logged(trainer, "rollout/mixed_frac")
    policy = load(task[0])  # TRL's own computes attention over packed rows alone
    policy.load_state_dict(trainer.model.state_dict())
    after = right_answers(policy, task[1])
    assert after > before + 0.01, (before, after)


def test_an_adapter_is_merged_for_an_engine_that_is_known_by_its_address(task, engine, on_cpu):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer, _, _ = make(task, engine.address, peft=lora, max_steps=2)
    trainer.train()
    assert abs(logged(trainer, "ratio")[0] - 1) < TOLERANCE
    assert engine.weight_version == "update 3"
    assert engine.status().num_running == 0


@pytest.mark.parametrize("pause", ["in_place", "retract"])
def test_generation_may_stand_still_while_an_update_travels(task, engine, on_cpu, pause):
    transfer = WeightTransfer(engine, pause=pause)
    trainer, _, _ = make(task, engine, transfer=transfer, max_steps=2)
    trainer.train()
    assert engine.status().paused is None or not engine.status().paused
    assert engine.weight_version == "update 3"


class Producing:
    """A worker and updates as TRL makes them, one after the other."""

    def __init__(self, task, engine, **options):
        folder, examples = task
        rewards = options.pop("reward_funcs", lengths)
        self.args = settings(folder, num_generations=2, max_inflight_tasks=4, **options)
        self.worker = RolloutWorker(engine, rewards, train_dataset=data(examples), args=self.args)
        self.transfer = WeightTransfer(engine)
        self.transfer.init_weight_transfer()
        self.model = noise(folder)
        self.policy = 0

    def update(self):
        self.transfer.pause()
        self.transfer.send_weights(iter(list(self.model.named_parameters())))
        self.transfer.resume()
        self.policy += 1
        self.worker.update_model_version(self.policy)

    def __enter__(self):
        self.update()
        return self

    def __exit__(self, *_):
        self.worker.stop()
        self.transfer.destroy()


def lengths(completions, **_):
    return [float(len(completion)) for completion in completions]


def drained(buffer):
    found = []
    with pytest.raises(queue.Empty):
        while True:
            found.append(buffer.get_nowait())
    return found


def test_completions_go_on_through_updates_and_are_as_old_as_their_first_token(task, engine):
    """Partial rollouts: nothing is begun again, and nothing lost, because weights arrive."""
    samples, mixed = [], []
    with Producing(task, engine, max_completion_length=56) as run:
        run.worker.start()

        def done():
            run.update()
            samples.extend((run.policy, sample) for sample in drained(run.worker.rollout_buffer))
            mixed.extend(row["rollout/mixed_frac"][0] for row in drained(run.worker.metrics_queue))
            run.worker.check_health(60.0)
            return sum(mixed) > 0 and len(samples) >= 16

        wait_until(done)
    num_prompt = NUM_DIGITS + 1
    for policy, sample in samples:
        assert 1 <= sample.model_version <= policy
        num_tokens = len(sample.input_ids) - num_prompt
        assert sample.completion_mask.tolist() == [0] * num_prompt + [1] * num_tokens
        assert sample.old_log_probs[:num_prompt].tolist() == [0.0] * num_prompt
        assert (sample.old_log_probs[num_prompt:] < 0).all()
    pairs = [sample.advantage for _, sample in samples]
    groups = {}
    for (_, sample), advantage in zip(samples, pairs, strict=True):
        groups.setdefault(sample.group_id, []).append(advantage)
    whole = [group for group in groups.values() if len(group) == 2]
    assert whole and all(sum(group) == pytest.approx(0.0, abs=1e-6) for group in whole)


def test_a_full_buffer_holds_generation_back_and_stopping_ends_all_requests(task, engine):
    with Producing(task, engine, queue_maxsize=6) as run:
        run.worker.start()
        wait_until(run.worker.rollout_buffer.full)
        wait_until(lambda: engine.status().num_running == 0)  # every lane waits
        run.worker.check_health(60.0)
    assert "trl-rollouts" not in {thread.name for thread in threading.enumerate()}
    assert run.worker.rollout_buffer.qsize() == 6
    assert engine.status().num_running == 0


def test_a_reward_that_fails_is_told_where_the_trainer_looks(task, engine):
    def wrong(completions, **_):
        raise KeyError("no such column")

    async def short(completions, **_):
        return [0.0]

    for reward, says in ((wrong, "no such column"), (short, "got 1 rewards, expected 2")):
        with Producing(task, engine, reward_funcs=reward) as run:
            run.worker.start()

            def failed(worker=run.worker):
                try:
                    worker.check_health(60.0)
                except RolloutError as error:
                    return str(error)
                return None

            wait_until(failed)
            assert says in failed()


def test_weights_that_do_not_fit_are_refused_and_the_iterator_is_exhausted(task, engine):
    transfer = WeightTransfer(engine, pause="in_place")
    transfer.init_weight_transfer()
    taken = []

    def tensors():
        for name in ("model.norm.weight", "nonsense", "more"):
            taken.append(name)
            yield name, torch.zeros(64)

    transfer.pause()
    with pytest.raises(ManifestMismatch, match="nonsense: unknown"):
        transfer.send_weights(tensors())
    assert taken == ["model.norm.weight", "nonsense", "more"]
    assert engine.weight_version == "poison"
    assert engine.generate(input_ids=[3, 2], sampling_params={"max_new_tokens": 1})["output_ids"]
    transfer.destroy()


def test_versions_of_the_engine_are_told_as_numbers_of_the_trainers_updates():
    versions = PolicyVersions()
    assert versions.policy_of(3) is None
    versions.note(7, 3)
    versions.note(8, 5)
    assert [versions.policy_of(n) for n in (2, 3, 4, 5, 6)] == [0, 7, 7, 8, None]
    versions.note(9, 5)  # told again
    assert versions.policy_of(5) == 9


def test_advantages_are_those_of_the_group_and_leave_out_what_nobody_could_score():
    nan = np.nan
    advantages, total, std = advantages_of(np.array([[1.0, 0.0, nan, 1.0], [0.0, nan, nan, 1.0]]))
    assert total[[0, 1, 3]].tolist() == [1.0, 0.0, 2.0] and np.isnan(total[2])
    assert std == pytest.approx(np.std([1.0, 0.0, 2.0]))
    assert advantages == pytest.approx([0.0, -1 / std, 0.0, 1 / std], abs=1e-6)
    assert advantages_of(np.full((1, 3), nan))[0].tolist() == [0.0] * 3
    assert advantages_of(np.ones((1, 3)))[0].tolist() == [0.0] * 3


def test_a_worker_says_what_it_lacks(task, engine, monkeypatch):
    folder, examples = task
    given = {"train_dataset": data(examples), "args": settings(folder)}
    with pytest.raises(ConfigError, match="no reward function"):
        RolloutWorker(engine, [], **given)
    with pytest.raises(ConfigError, match="at least 2"):
        RolloutWorker(engine, exact, **{**given, "args": settings(folder, num_generations=1)})
    with Engine.connect(engine.address, skip_tokenizer_init=True) as bare:
        with pytest.raises(ConfigError, match="give the tokenizer"):
            RolloutWorker(bare, exact, **given)
    monkeypatch.setattr("trl.__version__", "1.15.2")
    with pytest.raises(ConfigError, match=r"got trl 1\.15\.2"):
        RolloutWorker(engine, exact, **given)
    with pytest.raises(ConfigError, match=r"got trl 1\.15\.2"):
        WeightTransfer(engine)
