"""What clients of the OpenAI API send, with the fields that trainers and other engines have added to it."""

from __future__ import annotations

from typing import Any

from .bodies import Body


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False
    """End with a chunk that counts tokens."""
    continuous_usage_stats: bool = False
    """Has no effect."""


class SamplingBody(Body):
    """What completions and chats have in common."""

    model: str | None = None
    """The served model's name; null: whatever is served."""
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    """Keep what ended the output in its text."""
    no_stop_trim: bool = False
    """The same, in the common dialect."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens, with so many of the most likely ones."""
    return_token_ids: bool = False
    """Token ids of prompt and output, beside the text."""
    return_tokens_as_token_ids: bool = False
    """In log-probabilities, `token_id:17` in place of a token's text."""
    rid: str | None = None
    """An id for `/abort_request`."""
    request_id: str | None = None
    """The same, in the other dialect."""
    min_weight_version: int | None = None
    """Number of the oldest version of the weights that may compute it."""
    cache_salt: str | None = None
    """Share cached prefixes with prompts of the same salt alone."""
    return_hidden_states: bool = False
    """True is refused: there are none."""
    user: str | None = None
    """Has no effect."""
    store: bool | None = None
    """Has no effect: nothing is kept."""
    metadata: dict[str, Any] | None = None
    """Has no effect."""
    priority: int | None = None
    """Has no effect."""


class CompletionBody(SamplingBody):
    """`/v1/completions`."""

    prompt: str | list[str | int | list[int]] | None = None
    """Text or token ids, one prompt or several."""
    max_tokens: int = 16
    logprobs: int | None = None
    """Log-probabilities of the tokens, with so many of the most likely ones."""
    echo: bool = False
    """Begin the text, and the log-probabilities, with the prompt's."""
    add_special_tokens: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class ChatBody(SamplingBody):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None
    """The rendered prompt as token ids, in place of `messages`."""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    """Handed to the chat template; calls in the output stay text."""
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    """Has no effect: calls are not parsed."""


class TokensChatBody(ChatBody, kw_only=True):
    """`/v1/chat/completions/tokens`."""

    tokens: list[int]
    """The rendered prompt; `messages`, which are often beside it, are not looked at."""


class ScoreBody(Body):
    """`/v1/score`."""

    query: str | list[int]
    items: str | list[str | list[int]]
    label_token_ids: list[int]
    apply_softmax: bool = False
    item_first: bool = False
    model: str | None = None
