"""Checks a `Generate` command and turns it into scheduler requests, in pieces.

Everything that can be wrong with a request is found here, before the scheduler hears of it: a bad request gets a
`ValueError` that says what, got, expected, and no other request notices.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from functools import partial
from typing import Protocol

import msgspec

from weight_sync.wire.rpc import Call

from ...cache.prefix_cache import root_of
from ...config import ResolvedConfig
from ...errors import InvalidRequestError
from ...protocol.commands import Done, Generate, PromptSpec, too_many_samples
from ...protocol.embeds import check_embeds, identity_of, rows_of
from ...sampling_params import SamplingParams
from ...scheduling.admission import check_fits, in_use
from ...scheduling.request import Request
from ...scheduling.scheduler import Scheduler
from ...stop_strings import StopStringWatcher
from ...tokenizer import Tokenizer
from .opening import Opening, SentPrompt
from .sample_state import GenerateGroup, InputLogprobs, SampleState


class Holder(Protocol):
    """Who has requests that the scheduler does not know at present."""

    def holds(self, rid: str) -> bool:
        """Whether one of them has this id."""


class Admission:
    """Makes requests; counts arrivals so that requests without a seed get one that the engine's seed determines."""

    def __init__(
        self,
        config: ResolvedConfig,
        tokenizer: Tokenizer | None,
        end_ids: frozenset[int],
        hidden_size: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._hidden_size = hidden_size
        self._num_prompts = 0
        self._num_groups = 0
        self.pid = os.getpid()
        self.engine_id = ""
        """Which life of an engine this is; no other has it, also not one that takes its address over."""

    def open(self, call: Call, scheduler: Scheduler, others: Iterable[Holder]) -> GenerateGroup:
        """Validate the whole command; its requests are made later, piece by piece, of `group.opening`.

        Trainers also send a prompt n times; where the same is asked about it, all its samples are made together, so
        it is computed once. Raises `InvalidRequestError` for the first prompt that cannot be run, or whose id is that
        of a request, or one that any of `others` holds; then none of them runs.
        """
        command: Generate = call.body
        problem = too_many_samples(command.prompts)
        if problem is not None:
            raise InvalidRequestError(problem)
        prompts: dict[Hashable, list[SentPrompt]] = {}
        rids: set[str] = set()
        index, others = 0, list(others)
        for i, spec in enumerate(command.prompts):
            self._check(spec, f"prompt {i}" if len(command.prompts) > 1 else "the prompt")
            most = self._within_context(spec).max_new_tokens
            check_fits(spec.rid, len(spec.input_ids), most, scheduler.kv)
            part = SentPrompt(spec, index, self._num_prompts + i + 1)
            for rid in map(part.rid, range(spec.params.n)):
                used = (
                    rid in rids or scheduler.find(rid) or any(other.holds(rid) for other in others)
                )
                if used:
                    raise in_use(rid)
                rids.add(rid)
            prompts.setdefault(_asked_of_prompt(spec), []).append(part)
            index += spec.params.n
        self._num_prompts += len(command.prompts)
        self._num_groups += 1
        group = GenerateGroup(
            number=self._num_groups,
            channel=call,
            finish=lambda count: call.reply(Done(count=count)),
            stream=command.stream,
            deadline=call.deadline - command.grace_s,
            num_samples=index,
            engine_id=self.engine_id,
            min_version=command.min_weight_version,
        )
        group.opening = Opening(prompts.values(), partial(self._samples, group))
        return group

    @staticmethod
    def _inputs(spec: PromptSpec) -> InputLogprobs | None:
        if not spec.return_logprob or spec.logprob_start_len < 0:
            return None
        return InputLogprobs.for_prompt(spec.input_ids, spec.logprob_start_len)

    def _samples(
        self, group: GenerateGroup, part: SentPrompt, count: int, twin: Request | None
    ) -> list[Request]:
        spec = part.spec
        params = self._within_context(spec)
        inputs = twin.outputs.inputs if twin is not None else self._inputs(spec)
        embeds, rows = spec.input_embeds, None
        if embeds is not None:
            rows = rows_of(embeds) if twin is None else twin.input_embeds
        root = root_of(spec.cache_salt, "" if embeds is None else identity_of(embeds))
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._end_ids
        samples = []
        for i in range(part.done, part.done + count):
            watcher = None
            if params.stop and self._tokenizer is not None:
                watcher = StopStringWatcher(
                    self._tokenizer, params.stop, min_new_tokens=params.min_new_tokens
                )
            state = SampleState(group, spec, part.first + i, frozenset(stop_ids), watcher, inputs)
            samples.append(
                Request(
                    rid=part.rid(i),
                    prompt_ids=spec.input_ids,
                    params=params,
                    seed=params.seed_for_sample(
                        spec.first_sample + i, self._config.seed, part.number
                    ),
                    return_logprob=spec.return_logprob,
                    logprob_start_len=-1 if inputs is None else inputs.start,
                    top_logprobs_num=spec.top_logprobs_num,
                    token_ids_logprob=spec.token_ids_logprob,
                    stop_ids=sorted(stop_ids),
                    outputs=state,
                    root_uid=root,
                    input_embeds=rows,
                )
            )
        return samples

    def _within_context(self, spec: PromptSpec) -> SamplingParams:
        """The parameters, with no more output tokens than the context has room for."""
        room = self._config.context_length - len(spec.input_ids)
        params = spec.params
        if params.max_new_tokens <= room:
            return params
        return msgspec.structs.replace(
            params, max_new_tokens=room, min_new_tokens=min(params.min_new_tokens, room)
        )

    def _check(self, spec: PromptSpec, what: str) -> None:
        limit, vocab = self._config.context_length, self._config.vocab_size
        self._check_kind(spec)
        self._check_routes(spec, what)
        SamplingParams.from_dict(spec.params, vocab_size=vocab)
        num = len(spec.input_ids)
        if num == 0:
            raise InvalidRequestError(f"{what}: got no tokens, expected at least one")
        if num > limit or (num == limit and spec.params.max_new_tokens > 0):
            raise InvalidRequestError(
                f"{what}: got {num} tokens, expected fewer than the context length {limit}; shorten it or start the "
                "engine with a larger context_length"
            )
        self._check_tokens(spec.input_ids, vocab, what)
        if spec.input_embeds is not None:
            check_embeds(spec.input_embeds, num, self._hidden_size, what)
            if spec.return_logprob and spec.logprob_start_len >= 0:
                raise InvalidRequestError(
                    f"{what}: got logprob_start_len {spec.logprob_start_len} with input_embeds, expected -1: a prompt "
                    "without tokens has no log-probabilities of its own"
                )
        self._check_tokens(spec.token_ids_logprob or (), vocab, f"{what}, token_ids_logprob")
        if spec.logprob_start_len > num:
            raise InvalidRequestError(
                f"{what}: got logprob_start_len {spec.logprob_start_len}, expected at most the prompt's {num} tokens"
            )
        if spec.top_logprobs_num > vocab:
            raise InvalidRequestError(
                f"{what}: got top_logprobs_num {spec.top_logprobs_num}, expected at most the vocabulary size {vocab}"
            )
        if spec.params.stop and self._tokenizer is None:
            raise InvalidRequestError(
                f"{what}: got stop strings without a tokenizer; use stop_token_ids or drop skip_tokenizer_init"
            )

    def _check_routes(self, spec: PromptSpec, what: str) -> None:
        if spec.return_routed_experts and not self._config.user.enable_return_routed_experts:
            raise InvalidRequestError(
                f"{what}: got return_routed_experts, which this engine does not keep; start it with "
                "enable_return_routed_experts=True"
            )

    def _check_kind(self, spec: PromptSpec) -> None:
        if spec.pooling is None and self._config.num_labels is not None:
            raise InvalidRequestError(
                "generate: got a sequence-classification checkpoint, expected one with an output head; call classify"
            )
        if spec.pooling == "score" and self._config.num_labels is None:
            raise InvalidRequestError(
                "classify: got a checkpoint that generates, expected one that is ...ForSequenceClassification; "
                "call generate, score or sequence_logprobs"
            )

    @staticmethod
    def _check_tokens(ids: Iterable[int], vocab: int, what: str) -> None:
        worst = max(ids, default=0)
        if worst >= vocab:
            raise InvalidRequestError(
                f"{what}: got token id {worst}, expected ids within the vocabulary [0, {vocab}); "
                "is this the model's tokenizer?"
            )


def _asked_of_prompt(spec: PromptSpec) -> Hashable:
    """Equal for prompts that can share their computation: the same tokens, and the same log-probabilities of them."""
    return (
        tuple(spec.input_ids),
        spec.return_logprob,
        spec.logprob_start_len,
        spec.top_logprobs_num,
        spec.pooling,
        spec.cache_salt,
        spec.input_embeds,
        None if spec.token_ids_logprob is None else tuple(spec.token_ids_logprob),
    )
