"""One sample of one prompt, from the moment it is given to the scheduler until it is finished or aborted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cache.prefix_cache import ROOT_UID
from ..cache.sequence import CachedSequence
from ..sampling_params import SamplingParams
from ..types import RequestStatus

PENDING = -1
"""In `token_ids`, as the last one: a token that is drawn, but that the host does not know yet."""


class SampleGroup:
    """Requests with the same prompt, whose prompt is computed once.

    The leader computes it. The others are parked: they wait outside the queue until they are forked from the leader.
    If the leader goes away before that, the first of them leads.
    """

    __slots__ = ("leader", "members", "parked")

    def __init__(self, members: Sequence[Request]) -> None:
        self.members: tuple[Request, ...] = tuple(members)
        """All samples, also those that are finished."""
        self.leader: Request = members[0]
        """Who computes, or computed, the prompt."""
        self.parked: list[Request] = list(members[1:])
        """Those that wait for the leader, in order of arrival."""


class Request(CachedSequence):
    """A request as the scheduler and the sampler see it. Mutable; changed on the engine loop's thread only."""

    __slots__ = (
        "arrival",
        "final_length",
        "group",
        "input_embeds",
        "logprob_position",
        "logprob_start_len",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_retractions",
        "outputs",
        "params",
        "return_logprob",
        "rid",
        "sampler_state",
        "seed",
        "status",
        "stop_ids",
        "token_ids_logprob",
        "top_logprobs_num",
        "was_admitted",
    )

    def __init__(
        self,
        *,
        rid: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seed: int = 0,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        token_ids_logprob: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        outputs: Any = None,
        root_uid: int = ROOT_UID,
        input_embeds: Any = None,
    ) -> None:
        super().__init__(prompt_ids, root_uid)
        self.rid = rid
        """Unique among the scheduler's requests; samples of one prompt have one each."""
        self.num_prompt_tokens = len(self.token_ids)
        """Tokens of the prompt; what follows in `token_ids` is output."""
        self.final_length = self.num_prompt_tokens + params.max_new_tokens
        """Tokens, prompt included, with which it ends at the latest."""
        self.params = params
        """How tokens are drawn and when it ends; `params.n` is not looked at here."""
        self.seed = seed & ((1 << 64) - 1)
        """Seed of this sample, see `SamplingParams.seed_for_sample`."""
        self.return_logprob = return_logprob
        """Log-probabilities of drawn tokens are wanted."""
        self.logprob_start_len = logprob_start_len
        """First prompt token whose log-probability is wanted; -1: none."""
        self.top_logprobs_num = top_logprobs_num
        """Most likely tokens to report beside each; 0: none."""
        self.token_ids_logprob: tuple[int, ...] = tuple(token_ids_logprob or ())
        """Token ids whose log-probability to report beside each."""
        self.stop_ids: tuple[int, ...] = tuple(stop_ids)
        """Tokens that end it (end of sequence unless ignored, and stop ids); not drawn before `min_new_tokens`."""
        self.status = RequestStatus.NEW
        """Changed by the scheduler only."""
        self.arrival = -1
        """Position in the order of arrival, given by the scheduler."""
        self.group: SampleGroup | None = None
        """Samples of the same prompt; None: the only one."""
        self.num_cached_tokens = 0
        """Prompt tokens that were not computed for it: prefix hits when first admitted, or the fork's whole prompt."""
        self.was_admitted = False
        """It has owned blocks before."""
        self.num_retractions = 0
        """Times that its blocks were taken back under memory pressure or by a pause."""
        self.logprob_position = 0
        """First prompt position whose logits are still wanted as input log-probabilities (position p predicts token
        p + 1); the last position or more: none is left."""
        self.rewind_input_logprobs()
        self.sampler_state: Any = None
        """The sampler's own."""
        self.outputs = outputs
        """The engine's own."""
        self.input_embeds = input_embeds
        """(prompt tokens, hidden), the runner's: what the first layer reads at the prompt, whose ids mean nothing then.
        Kept to the end, because blocks may be taken back. None: the ids are the prompt."""

    def rewind_input_logprobs(self) -> None:
        """Want input log-probabilities from the first on, unless the prompt was computed and a token drawn from it."""
        last = self.num_prompt_tokens - 1
        start = self.logprob_start_len
        if self.logprob_position < last or not self.num_output_tokens:
            self.logprob_position = last if start < 0 else max(start - 1, 0)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        """Tokens drawn so far (a copy)."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def known_prompt(self) -> list[int]:
        """Tokens of the prompt, for what looks at tokens; of a prompt of rows none."""
        return [] if self.input_embeds is not None else self.token_ids[: self.num_prompt_tokens]

    @property
    def reuse_limit(self) -> int:
        """Positions that may come from the prefix cache: not the last token's, nor those with wanted logits."""
        if self.logprob_position < self.num_prompt_tokens - 1:
            return self.logprob_position
        return len(self.token_ids) - 1

    def __repr__(self) -> str:
        return (
            f"Request({self.rid!r}, {self.status.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed})"
        )
