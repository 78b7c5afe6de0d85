"""Conversations of several turns for an `AsyncGRPOTrainer`: tools that are called, environments that answer.

As TRL 1.16 has them: every turn renders the whole conversation, generates, and calls what the answer asks for; TRL's
own reconciler makes training rows of the turns, in which only sampled tokens count. Tools and environments run on
threads of this process, or are coroutine functions.
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rollout.errors import ConfigError, RolloutError

from .contract import check_private
from .groups import Rollout, Row
from .sampling import checked_logprobs, oldest_version, token_ids

EnvironmentFactory = Callable[[], Any]
Generate = Callable[[list[int]], Awaitable[Mapping[str, Any]]]
"""`generate(prompt_ids)`: the engine's result of one sample."""

_OF_ENVIRONMENTS = ("reset", "get_reward")
_PARSERS = ("template", "schema")
_NO_PROMPT = [{"role": "user", "content": ""}]


class Toolbox:
    """Tools that every conversation has, and environments, of which each conversation has one to itself."""

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]] | None,
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None,
    ) -> None:
        """environment_factory: one for all rows, or several by name, of which a row's `environment` chooses."""
        self._tools = list(tools or ())
        self._by_name = isinstance(environment_factory, Mapping)
        self._factories: dict[Any, EnvironmentFactory] = {}
        if isinstance(environment_factory, Mapping):
            self._factories = dict(environment_factory)
        elif environment_factory is not None:
            self._factories = {None: environment_factory}
        # Made once and reset often; one is made now, so that what is wrong with it is an error here.
        self._idle = {name: [factory()] for name, factory in self._factories.items()}
        for (made,) in self._idle.values():
            if not callable(getattr(made, "reset", None)):
                raise ConfigError(
                    f"environment_factory: got a {type(made).__name__} without `reset`, expected one with it"
                )
        self.owners = list(
            dict.fromkeys(
                type(made).__name__
                for (made,) in self._idle.values()
                if callable(getattr(made, "get_reward", None))
            )
        )
        """Classes of environments that score a conversation themselves, each a column of rewards."""

    def __bool__(self) -> bool:
        return bool(self._tools or self._factories)

    @property
    def has_environments(self) -> bool:
        """Rows need no prompt: an environment's `reset` may give it."""
        return bool(self._factories)

    async def enter(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """(environment, prompt): one that is free, or a new one, reset for `row`; None where there are none."""
        prompt = row["prompt"] if "prompt" in row or not self._factories else _NO_PROMPT
        if isinstance(prompt, str):
            raise RolloutError(
                "prompt: got text, expected a list of messages: answers of tools are messages"
            )
        if not self._factories:
            return None, prompt
        name = row.get("environment") if self._by_name else None
        if name not in self._factories:
            raise RolloutError(
                f"environment: got {name!r} in a row, expected one of {', '.join(map(str, self._factories))}"
            )
        environment = self._idle[name].pop() if self._idle[name] else self._factories[name]()
        given = {
            key: value for key, value in row.items() if not (self._by_name and key == "environment")
        }
        observation = await called(environment.reset, **given)
        return environment, prompt if observation is None else _observed(prompt, observation)

    def leave(self, row: Mapping[str, Any], environment: Any) -> None:
        """The environment is free again."""
        if environment is not None:
            self._idle[row.get("environment") if self._by_name else None].append(environment)

    def tools(self, environment: Any) -> list[Callable[..., Any]]:
        """What a conversation may call: functions for everybody, and its environment's public methods."""
        kind = type(environment)
        methods = [
            getattr(environment, name)
            for name, _ in inspect.getmembers(kind, predicate=inspect.isfunction)
            if environment is not None and not name.startswith("_") and name not in _OF_ENVIRONMENTS
        ]
        return self._tools + methods

    async def reward(self, environment: Any) -> tuple[str, float | None] | None:
        """(class, reward) of an environment that scores by itself."""
        name = type(environment).__name__
        if environment is None or name not in self.owners:
            return None
        return name, await called(environment.get_reward)


class Conversations:
    """Converses for a worker, and counts what happens."""

    def __init__(self, toolbox: Toolbox, tokenizer: Any, args: Any, context_length: int) -> None:
        check_private("conversations")
        from trl.chat_template_utils import (
            add_response_schema,
            get_training_chat_template,
            is_chat_template_prefix_preserving,
        )

        if all(getattr(tokenizer, f"response_{kind}", None) is None for kind in _PARSERS):
            tokenizer = add_response_schema(tokenizer)  # by which TRL finds calls in an answer
        self._toolbox, self._tokenizer = toolbox, tokenizer
        self._max_calls = args.max_tool_calling_iterations
        self._fork_threshold = args.fork_threshold_tokens
        self._context_length = context_length
        self._template: dict[str, Any] = dict(args.chat_template_kwargs or {})
        if not is_chat_template_prefix_preserving(
            tokenizer
        ):  # else a turn rewrites those before it
            self._template["chat_template"] = get_training_chat_template(tokenizer)
        self.counts: Counter[str] = Counter()
        """Calls and failures of each tool since it was last emptied, under TRL's names."""

    async def converse(self, row: Mapping[str, Any], generate: Generate) -> Rollout:
        """One conversation from a row's prompt to an answer that calls nothing."""
        environment, prompt = await self._toolbox.enter(row)
        try:
            rollout = await self._turns(prompt, self._toolbox.tools(environment), generate)
            rollout.own_reward = await self._toolbox.reward(environment)
        finally:
            self._toolbox.leave(row, environment)
        return rollout

    async def _turns(
        self, prompt: list[dict[str, Any]], tools: list[Callable[..., Any]], generate: Generate
    ) -> Rollout:
        from trl.experimental.async_grpo import async_rollout_worker as theirs

        rollout = Rollout(prompt=prompt, completion=[])
        by_name = {tool.__name__: tool for tool in tools}
        turns: list[Any] = []
        while True:
            messages = [*prompt, *rollout.completion]
            ids = token_ids(self._tokenizer, [messages], tools=tools or None, **self._template)[0]
            if turns and len(ids) >= self._context_length:
                rollout.is_cut = rollout.is_truncated = True
                break
            result = await generate(ids)
            sampled = list(result["output_ids"])
            rollout.add_turn(result, oldest_version(result))
            turns.append(theirs.TurnRecord(ids, sampled, checked_logprobs(result)))
            answer = theirs.parse_response(self._tokenizer, sampled, prefix=ids, tools=tools)
            rollout.completion.append(answer)
            wanted = answer.get("tool_calls")
            if not wanted:
                break
            if self._max_calls is not None and len(turns) > self._max_calls:
                rollout.is_cut = True
                break
            for call in wanted:
                rollout.completion.append(await self._call(call["function"], by_name, rollout))
        chained, tally = theirs._chain_to_sequences(turns, uuid.uuid4().hex, self._fork_threshold)
        rollout.rows = [
            Row(each.input_ids, each.completion_mask, each.old_log_probs) for each in chained
        ]
        rollout.num_turns, rollout.num_forks = len(turns), int(tally["fork"])
        return rollout

    async def _call(
        self,
        function: Mapping[str, Any],
        tools: Mapping[str, Callable[..., Any]],
        rollout: Rollout,
    ) -> dict[str, Any]:
        """What a tool answers, as a message; what it raises is an answer, too."""
        name = function["name"]
        rollout.num_calls += 1
        self.counts[f"tools/{name}/call_total"] += 1
        content: Any
        if name not in tools:  # The policy's mistake, which training should end; not the tool's.
            self.counts["tools/unknown_name_total"] += 1
            content = {"error": f"unknown tool {name}"}
        else:
            try:
                content = await called(tools[name], **dict(function.get("arguments") or {}))
            except Exception as error:
                content = {"error": str(error)}
        if isinstance(content, dict) and set(content) == {"error"}:
            rollout.num_failures += 1
            self.counts[f"tools/{name}/failure_total"] += 1
        return {"role": "tool", "name": name, "content": str(content)}


async def called(function: Callable[..., Any], **arguments: Any) -> Any:
    """The value of a function, which runs on a thread, or of a coroutine function."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    ):
        return await function(**arguments)
    return await asyncio.to_thread(function, **arguments)


def _observed(prompt: list[dict[str, Any]], observation: Any) -> list[dict[str, Any]]:
    """The prompt with what an environment says at its end; the row's own stays as it is."""
    last = prompt[-1]
    if not isinstance(observation, str) or not isinstance(last["content"], str):
        raise RolloutError(
            f"reset: got {type(observation).__name__} after {type(last['content']).__name__}, expected text after "
            "text; this engine generates from text alone"
        )
    return [*prompt[:-1], {**last, "content": last["content"] + observation}]
