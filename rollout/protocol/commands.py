"""What a client may ask of an engine process, and what it answers.

These structs travel over ZMQ as MessagePack with their class name as tag; they are the same objects in the caller's
process and in a child's, so every executor serves the same surface. Weight updates have their own messages in
`weight_sync.wire.messages`; the two unions together are the engine's command stream. Sizes are bounded here, meaning is
checked where a command is carried out.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rollout.sampling_params import SamplingParams

MAX_PROMPTS = 65_536
MAX_TOKENS = 1 << 22
MAX_CALL_SAMPLES = 65_536
"""Samples of all prompts of one `Generate` together."""

Text = Annotated[str, Meta(max_length=1 << 16)]
Ident = Annotated[str, Meta(max_length=256)]
TokenIds = Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 31)]], Meta(max_length=MAX_TOKENS)]
PauseMode = Literal["abort", "retract", "in_place"]
MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
MEMORY_TAGS: tuple[MemoryTag, ...] = ("weights", "kv_cache", "cuda_graph")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every command and answer: immutable, tagged with its class name, unknown fields refused."""


class InputEmbeds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands for a prompt's tokens where it has none: what the first layer reads at each of its positions."""

    dtype: Literal["float32", "bfloat16", "float16"]
    """Of `data`; the engine computes with its own."""
    shape: tuple[Annotated[int, Meta(ge=1, lt=1 << 31)], Annotated[int, Meta(ge=1, lt=1 << 31)]]
    """Tokens, hidden size."""
    data: bytes
    """Little-endian, row-major."""


class PromptSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt of a `Generate`; its `params.n` samples share the prompt's KV."""

    rid: Ident
    """Request id; with n > 1 the samples are `rid`-0, `rid`-1, and so on."""
    input_ids: TokenIds
    """Prompt tokens, at least one; with `input_embeds` they only hold the places."""
    params: SamplingParams
    """How to sample."""
    first_sample: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    """Number of its first sample among those of one request that share a seed."""
    return_logprob: bool = False
    """Return the log-probability of every output token."""
    logprob_start_len: Annotated[int, Meta(ge=-1)] = -1
    """First prompt position whose log-probability is wanted; -1: none."""
    top_logprobs_num: Annotated[int, Meta(ge=0, le=1024)] = 0
    """How many of the most likely tokens to return per position."""
    token_ids_logprob: TokenIds | None = None
    """Tokens whose log-probability is wanted at every position; None: none."""
    pooling: Literal["score", "embedding"] | None = None
    """What to return of the last position, with `max_new_tokens` 0: "score", a classifier's; "embedding", the hidden
    state after the last norm; None: nothing."""
    return_token_times: bool = False
    """Return the wall-clock time (seconds since the epoch) of each output token."""
    return_routed_experts: bool = False
    """Return which experts each token went to, when a sample has finished."""
    routed_experts_start_len: Annotated[int, Meta(ge=0)] = 0
    """First position whose experts are wanted."""
    cache_salt: Annotated[str, Meta(max_length=512)] = ""
    """Prompts share cached prefixes with those of the same salt alone."""
    input_embeds: InputEmbeds | None = None
    """Rows in place of the tokens of `input_ids`, of the same number."""


class Generate(Message, frozen=True, kw_only=True):
    """Run prompts; answered by a `SampleUpdate` per finished sample (or per step, streaming), then `Done`."""

    prompts: Annotated[list[PromptSpec], Meta(min_length=1, max_length=MAX_PROMPTS)]
    """Prompts in the order of the result."""
    stream: bool = False
    """Send every token as it comes."""
    grace_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    """How long before the call's deadline what there is comes back, with finish reason "abort"."""
    min_weight_version: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    """Number of the oldest version that may compute it; the call waits until the engine serves that or a later one."""


class AbortRequests(Message, frozen=True, kw_only=True):
    """End requests early; their partial results are delivered with finish reason "abort"."""

    rids: list[Ident] = []
    """Request ids; the id of an n > 1 prompt ends all its samples."""
    abort_all: bool = False
    """End every request, running or queued."""


class PauseGeneration(Message, frozen=True, kw_only=True):
    """Stop generating until `ContinueGeneration` or until the lease ends."""

    mode: PauseMode = "abort"
    """abort: end all requests; retract: drop their KV and queue them again; in_place: freeze them."""
    lease_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    """Seconds after which the pause ends by itself."""


class ContinueGeneration(Message, frozen=True, kw_only=True):
    """End a pause; no error if there is none."""


class FlushCache(Message, frozen=True, kw_only=True):
    """Drop every cached prefix; refused while requests are pending, unless they are to be computed again."""

    recompute: bool = False
    """Running requests lose their keys and values, too, and compute them again."""


class StartProfile(Message, frozen=True, kw_only=True):
    """Record what the engine loops do, until `StopProfile`; refused while a profile is under way."""


class StopProfile(Message, frozen=True, kw_only=True):
    """Write the profile, a file for each rank on its host; answered by `ProfileWritten`."""


class SlowDown(Message, frozen=True, kw_only=True):
    """Wait before every step, so that others can be tested with an engine that is slow."""

    seconds: Annotated[float, Meta(ge=0, le=10)]
    """How long; 0: not any more. Commands wait as long."""


class SetLimits(Message, frozen=True, kw_only=True):
    """Other limits of a step from now on, up to those of the start; None: leave it as it is."""

    max_running_requests: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    """Requests that hold KV at once; those beyond are queued again, the last first."""
    chunked_prefill_size: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    """Tokens of a step."""


class RecordExperts(Message, frozen=True, kw_only=True):
    """Count which experts tokens go to; refused where the model has none. "dump" is answered by `ExpertCounts`."""

    action: Literal["start", "stop", "dump"]
    """start: from zero; stop: count no more, and keep the counts; dump: tell them, counting or not."""


class FreezeGc(Message, frozen=True, kw_only=True):
    """Collect garbage once, and leave all that lives now out of later collections."""


class GetWeights(Message, frozen=True, kw_only=True):
    """Read one parameter back by its Hugging Face name."""

    name: Annotated[str, Meta(max_length=512)]
    """Trainer-side name; aliases and fused names work too."""
    truncate_size: Annotated[int, Meta(ge=0)] = 100
    """Rows (entries of dimension 0) to return at most."""
    first_row: Annotated[int, Meta(ge=0)] = 0
    """The row to begin with."""


class SaveShardedModel(Message, frozen=True, kw_only=True):
    """Write each rank's parameters, as they lie in memory, on its host; answered by `Done` with the number of files."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """Folder on the hosts of the ranks."""
    pattern: Annotated[str, Meta(max_length=256)] | None = None
    """Names of the files, with `{rank}` and `{part}`; None: the usual ones."""
    max_size: Annotated[int, Meta(gt=0, lt=1 << 62)] | None = None
    """Bytes of tensors in a file; None: 5 GiB."""


class ResetWeights(Message, frozen=True, kw_only=True):
    """Overwrite all parameters with noise: nothing is generated until a complete update has come."""


class ReleaseMemory(Message, frozen=True, kw_only=True):
    """Give memory back to the system; requests wait until it is resumed."""

    tags: list[MemoryTag]
    """What to release."""
    keep_weights: bool = False
    """Bring the weights back as they were when they are resumed."""


class ResumeMemory(Message, frozen=True, kw_only=True):
    """Make released memory usable again."""

    tags: list[MemoryTag]
    """What to resume."""


class GetStatus(Message, frozen=True, kw_only=True):
    """Ask for counts, versions and sizes; answered between two steps."""


class Shutdown(Message, frozen=True, kw_only=True):
    """End the engine process; running requests end with finish reason "abort"."""


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a sample ended."""

    type: Literal["stop", "length", "abort"]
    """stop: an end token or stop string; length: a limit; abort: someone or something ended it."""
    matched: int | str | None = None
    """Token id or string that matched (type "stop")."""
    length: int | None = None
    """The limit that was reached, in output tokens (type "length")."""
    message: str | None = None
    """Reason in words (type "abort")."""


class RoutedExperts(msgspec.Struct, frozen=True):
    """Experts of the tokens from `routed_experts_start_len` on, all but the last, which is never an input."""

    shape: tuple[int, int, int]
    """Tokens, layers, experts of a token."""
    data: bytes
    """Little-endian int16, row-major; -1 in layers without experts."""


ENDED_LATE = "the deadline has passed"
"""How the message of samples begins that were not finished by the deadline of their call."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Output tokens [start, end) were sampled by the weight version with this label and this number."""

    version: str
    start: int
    end: int
    number: int = 0


TopLogprobs = list[tuple[float, int]]


class SampleUpdate(Message, frozen=True, kw_only=True):
    """News of one sample: all of it when it finished, or what is new since the last update when streaming."""

    index: int
    """Prompt-major position: prompt number x n + sample number."""
    rid: str
    """The sample's id."""
    output_ids: list[int]
    """Output tokens (new ones only, when streaming)."""
    finish_reason: FinishReason | None
    """None while it runs."""
    text_end: tuple[int, int] | None = None
    """The text ends after so many output tokens, less so many characters of the last of these: there a stop string
    begins, or, while it runs, what may become one; None: after all."""
    prompt_tokens: int
    """Tokens of the prompt."""
    cached_tokens: int
    """Prompt tokens that came from the prefix cache."""
    weight_version: str
    """Label of the version that serves now."""
    weight_version_number: int = 0
    """Its number, which grows with every update, whatever the labels."""
    weight_versions: list[Span] = []
    """Spans over all output tokens so far."""
    output_logprobs: list[float] | None = None
    """Log-probability per token of `output_ids`; None: not asked for."""
    output_top_logprobs: list[TopLogprobs] | None = None
    """Most likely tokens per output position."""
    output_ids_logprobs: list[TopLogprobs] | None = None
    """Log-probabilities of the asked token ids per output position."""
    input_logprobs: list[tuple[float | None, int]] | None = None
    """(log-probability, token) per prompt position from `logprob_start_len`; None for position 0."""
    input_top_logprobs: list[TopLogprobs | None] | None = None
    """Most likely tokens per prompt position."""
    input_ids_logprobs: list[TopLogprobs | None] | None = None
    """Log-probabilities of the asked token ids per prompt position."""
    pooled: list[float] | None = None
    """What `pooling` asked for; None: nothing, or the sample ended before it was computed."""
    token_times: list[float] | None = None
    """Seconds since the epoch of each token of `output_ids`."""
    routed_experts: RoutedExperts | None = None
    """Which experts its tokens went to; None: it was not asked for, or has not finished."""
    e2e_latency: float = 0.0
    """Seconds from arrival in the engine process until this update."""
    num_retractions: int = 0
    """How often its KV was dropped and computed again."""
    num_reruns: int = 0
    """How often it began anew because its replica died (pools); what came before a new beginning is void."""
    engine_id: str = ""
    """Which life of an engine computed it; empty: none has."""


class ProfileWritten(Message, frozen=True, kw_only=True):
    """A profile is on disk."""

    path: str
    """Rank 0's file, on its host; other ranks write files of their own there."""


class ExpertCounts(Message, frozen=True, kw_only=True):
    """How many times tokens went to each expert since the counting began."""

    shape: tuple[int, int]
    """Layers, experts."""
    data: bytes
    """Little-endian int64, row-major; zeros in layers without experts."""


class Done(Message, frozen=True, kw_only=True):
    """A command was carried out."""

    count: int = 0
    """How many things it touched: samples delivered, requests ended, blocks dropped."""


class MemoryChanged(Message, frozen=True, kw_only=True):
    """Answer to `ReleaseMemory` and `ResumeMemory`; a tag that was in that state already counts nothing."""

    tags: list[MemoryTag]
    """What changed its state."""
    num_bytes: int
    """Bytes that were given back or taken, all ranks together."""


class WeightValues(Message, frozen=True, kw_only=True):
    """Answer to `GetWeights`: the leading rows as float32."""

    shape: list[int]
    """Shape of `data`, after truncation."""
    data: bytes
    """Little-endian float32, row-major."""


class SyncSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A weight update that an engine has committed; seconds, on its clock."""

    version: int
    """Number of the version that it made."""
    label: str | None
    """Its label."""
    ago_s: float
    """How long ago it was committed."""
    num_updated: int
    """Tensors that were written."""
    stage_s: float
    """Checking staged bytes, generation going on meanwhile."""
    copy_s: float
    """Writing the resident parameters."""
    verify_s: float
    """Fingerprinting the resident parameters."""
    pause_s: float
    """From the end of the last step on the old version to the start of the next."""
    total_s: float
    """From `Begin` until the resident bytes were found right."""


STEP_EDGES_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""Upper edges of the classes in which steps are counted."""


class Status(Message, frozen=True, kw_only=True):
    """Answer to `GetStatus`."""

    weight_version: str
    """Label of the version that serves."""
    version: int
    """Its monotone number."""
    torn: str | None
    """Why the weights are a mixture; None: they are whole."""
    paused: str | None
    """Mode of the pause; None: not paused."""
    pause_left_s: float | None = None
    """Seconds until the pause ends by itself; None: not paused."""
    released: list[MemoryTag]
    """Memory that is given back at present."""
    num_running: int
    """Requests that hold KV blocks."""
    num_waiting: int
    """Requests in the queue."""
    num_free_blocks: int
    """KV blocks free or reclaimable."""
    num_blocks: int
    """KV blocks in the pool."""
    resolved: dict[str, int | float | str | bool | None]
    """The resolved configuration."""
    pid: int
    """Process that runs the engine loop."""
    engine_id: str = ""
    """Which life of an engine this is: another one at the same address has another."""
    num_decoded_tokens: int = 0
    """Tokens that running requests have drawn since the start; of a prompt's last step not."""
    num_prompt_tokens: int = 0
    """Tokens of prompts that were computed since the start."""
    step_counts: list[int] = []
    """Steps since the start by how long they took, one class for each of `STEP_EDGES_S`, and one for longer ones."""
    step_s: float = 0.0
    """Seconds of all these steps together."""
    syncs: list[SyncSeen] = []
    """The last updates, the newest first."""


Command = (
    Generate
    | AbortRequests
    | PauseGeneration
    | ContinueGeneration
    | FlushCache
    | StartProfile
    | StopProfile
    | FreezeGc
    | SlowDown
    | SetLimits
    | RecordExperts
    | GetWeights
    | SaveShardedModel
    | ResetWeights
    | ReleaseMemory
    | ResumeMemory
    | GetStatus
    | Shutdown
)
Answer = SampleUpdate | Done | ProfileWritten | ExpertCounts | MemoryChanged | WeightValues | Status


def too_many_samples(prompts: Sequence[PromptSpec]) -> str | None:
    """Why a call asks for too much; None: it does not."""
    num = sum(spec.params.n for spec in prompts)
    if num <= MAX_CALL_SAMPLES:
        return None
    return (
        f"generate: got {num} samples in one call ({len(prompts)} prompts), expected at most {MAX_CALL_SAMPLES}; "
        "make several calls"
    )
