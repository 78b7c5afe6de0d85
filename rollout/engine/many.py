"""`as_completed` and `resume`: many prompts as they finish, and samples that were ended early, with `async_` twins."""

from __future__ import annotations

import asyncio
import functools
import inspect
import queue
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from weight_sync.wire.futures import no_answer

from ..errors import InvalidRequestError
from ..sampling_params import SamplingParams
from .generation import GenerationCalls, Result
from .prepare import PreparedGenerate
from .resuming import Resumption, check_results, is_aborted, joined, resumption
from .twins import Asking, asks, awaitable, definition_of

Samples = Result | list[Result]
"""What `generate` returns for one prompt: a dictionary, or a list of n."""


class ManyCalls(GenerationCalls):
    """The part of `Engine` for trainers that do not want to wait for a whole batch."""

    def as_completed(
        self,
        prompt: Iterable[Any] | None = None,
        sampling_params: Any = None,
        input_ids: Iterable[Any] | None = None,
        *,
        max_in_flight: int = 64,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Samples]]:
        """Complete prompts and yield each, as (its place, what `generate` returns for it), when it has finished.

        prompt or input_ids: texts, or lists of token ids; also an iterator without end, which is read only as far as it
        is needed. max_in_flight: prompts that the engine has at once; when one is taken out, the next goes in, so the
        engine is idle only when its taker is slower than all. sampling_params, timeout_s and `options` are those
        of `generate`, for each prompt (`stream` and `rid` excepted); all samples of a prompt come together.

        Closing the iterator aborts what is running. An error of one prompt is raised when its turn comes, and ends all.
        """
        prompts, start = self._many(
            prompt, input_ids, sampling_params, max_in_flight, timeout_s, options
        )
        return self._completed(prompts, start, max_in_flight)

    async def async_as_completed(
        self,
        prompt: Iterable[Any] | None = None,
        sampling_params: Any = None,
        input_ids: Iterable[Any] | None = None,
        *,
        max_in_flight: int = 64,
        timeout_s: float | None = None,
        **options: Any,
    ) -> AsyncIterator[tuple[int, Samples]]:
        """As `as_completed`, awaitable; it returns an async iterator, whose `aclose` aborts what is running."""
        prompts, start = self._many(
            prompt, input_ids, sampling_params, max_in_flight, timeout_s, options
        )
        return self._async_completed(prompts, start, max_in_flight)

    @asks
    def resume(
        self,
        results: Sequence[Mapping[str, Any]],
        sampling_params: Any = None,
        *,
        min_weight_version: int | None = None,
        cache_salt: str | Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> Asking[list[Result]]:
        """Go on with samples that a pause, an abort or a deadline has ended; the others come back as they are.

        results: what `generate(..., return_prompt_token_ids=True)` returned. sampling_params: what it was given, one
        for all or one for each result; `max_new_tokens` and `min_new_tokens` count what is there already. A result that
        went on has the ids, log-probabilities, token times and weight versions of both parts, one after the other: each
        token still says which version drew it; `meta_info["num_resumes"]` says how often. With a `sampling_seed` the
        draws repeat, but they are not those of a sample that was never ended. `cache_salt` is what `generate` was
        given, one for all or one for each result: results do not have it, and without it their prompts share cached
        prefixes with those of everybody.

        Raises `InvalidRequestError` where the two parts cannot be one sample: with stop strings, frequency or presence
        penalties, tables of top log-probabilities, or routed experts; and for what are no results.
        """
        check_results(results)
        params = self._params_of(results, sampling_params)
        wanted = resumption(results, params, cache_salt)
        answers = []
        if wanted.rows:
            call = {**wanted.call, "min_weight_version": min_weight_version}
            answers = yield from _generate(self, **call, timeout_s=timeout_s)
        return self._resumed(results, params, wanted, answers)

    async_resume = awaitable(resume)

    # ---- below the surface -----------------------------------------------------------------------------------------

    def _many(
        self,
        prompt: Iterable[Any] | None,
        input_ids: Iterable[Any] | None,
        sampling_params: Any,
        max_in_flight: int,
        timeout_s: float | None,
        options: Mapping[str, Any],
    ) -> tuple[Iterator[Any], Callable[[Any], _Started]]:
        """The prompts, and what sends one of them."""
        if (prompt is None) == (input_ids is None):
            got = "both" if prompt is not None else "neither"
            raise InvalidRequestError(f"got {got} of prompt and input_ids, expected exactly one")
        if isinstance(prompt, str):
            raise InvalidRequestError(
                "as_completed: got one prompt, expected several; call generate"
            )
        if (
            isinstance(max_in_flight, bool)
            or not isinstance(max_in_flight, int)
            or max_in_flight < 1
        ):
            raise InvalidRequestError(
                f"max_in_flight: got {max_in_flight!r}, expected a number of at least 1"
            )
        refused = sorted({"stream", "rid"} & options.keys())
        if refused:
            raise InvalidRequestError(
                f"as_completed: got {refused}, expected neither stream nor rid"
            )
        name, source = ("prompt", prompt) if prompt is not None else ("input_ids", input_ids)
        assert source is not None
        given = {"sampling_params": sampling_params, "timeout_s": timeout_s, **options}

        def start(item: Any) -> _Started:
            call = _SIGNATURE.bind(self, **{name: item}, **given)
            call.apply_defaults()
            prepared = self._prepare(call.arguments)
            limit = self._limit(prepared, timeout_s)
            future = self._executor.submit(prepared.command, timeout_s=limit, on_chunk=prepared.add)
            return prepared, future, limit

        return iter(source), start

    def _completed(
        self, prompts: Iterator[Any], start: Callable[[Any], _Started], max_in_flight: int
    ) -> Iterator[tuple[int, Samples]]:
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        running: dict[int, _Started] = {}
        numbered = enumerate(prompts)
        try:
            while True:
                _fill(running, numbered, start, max_in_flight, done.put)
                if not running:
                    return
                limit = next(iter(running.values()))[2]
                try:
                    place = done.get(timeout=limit)
                except queue.Empty:
                    raise no_answer(limit, "as_completed") from None
                prepared, future, _ = running[place]
                future.result()
                del running[place]
                yield place, prepared.result()
        finally:
            self._abandon_all(running)

    async def _async_completed(
        self, prompts: Iterator[Any], start: Callable[[Any], _Started], max_in_flight: int
    ) -> AsyncIterator[tuple[int, Samples]]:
        done: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        put = functools.partial(_put_soon, loop, done)
        running: dict[int, _Started] = {}
        numbered = enumerate(prompts)
        try:
            while True:
                _fill(running, numbered, start, max_in_flight, put)
                if not running:
                    return
                limit = next(iter(running.values()))[2]
                try:
                    async with asyncio.timeout(limit):
                        place = await done.get()
                except TimeoutError:
                    raise no_answer(limit, "as_completed") from None
                prepared, future, _ = running[place]
                future.result()
                del running[place]
                yield place, prepared.result()
        finally:
            self._abandon_all(running)

    def _abandon_all(self, running: Mapping[int, _Started]) -> None:
        for prepared, future, _ in running.values():
            self._abandon(prepared, future)

    def _params_of(
        self, results: Sequence[Mapping[str, Any]], sampling_params: Any
    ) -> list[SamplingParams]:
        """The sampling parameters of each result, as `generate` reads them."""
        if isinstance(sampling_params, (list, tuple)) and len(sampling_params) != len(results):
            raise InvalidRequestError(
                f"sampling_params: got {len(sampling_params)}, expected one for all or one for each of "
                f"{len(results)} results"
            )
        listed = isinstance(sampling_params, (list, tuple))
        values = sampling_params if listed else [sampling_params] * len(results)
        read = []
        for result, value in zip(results, values, strict=True):
            ids = result.get("prompt_token_ids") or [0]
            call = _SIGNATURE.bind(self, input_ids=list(ids), sampling_params=value)
            call.apply_defaults()
            read.append(self._prepare(call.arguments).command.prompts[0].params)
        return read

    def _resumed(
        self,
        results: Sequence[Mapping[str, Any]],
        params: Sequence[SamplingParams],
        wanted: Resumption,
        answers: Sequence[Result],
    ) -> list[Result]:
        second = dict(zip(wanted.rows, answers, strict=True))
        return [
            joined(dict(result), second.get(i), params[i], self._tokenizer)
            if is_aborted(result)
            else dict(result)
            for i, result in enumerate(results)
        ]


_Started = tuple[PreparedGenerate, "Future[Any]", float]
"""A prompt that was sent: its results, the end, and how long that may take, in seconds."""

_SIGNATURE = inspect.signature(GenerationCalls.generate)
_generate = definition_of(GenerationCalls.generate)


def _fill(
    running: dict[int, _Started],
    numbered: Iterator[tuple[int, Any]],
    start: Callable[[Any], _Started],
    max_in_flight: int,
    done: Callable[[int], None],
) -> None:
    """Send prompts until as many run as may; `done` hears the places of those that end, from any thread."""
    while len(running) < max_in_flight and (item := next(numbered, None)) is not None:
        place, prompt = item
        running[place] = started = start(prompt)
        started[1].add_done_callback(functools.partial(_tell, done, place))


def _tell(done: Callable[[int], None], place: int, _: Future[Any]) -> None:
    done(place)


def _put_soon(loop: asyncio.AbstractEventLoop, done: asyncio.Queue[int], place: int) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(done.put_nowait, place)
