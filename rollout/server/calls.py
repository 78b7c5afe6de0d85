"""Generation on behalf of clients: limits, request ids, and the engine's asynchronous calls.

A client's request ids are its own. The engine sees others, which nobody can guess, so that two clients may use the
same id, and one cannot end what another one runs.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from starlette.requests import Request

from ..engine.engine import Engine
from ..errors import InvalidRequestError
from ..protocol.embeds import read_embeds
from ..sampling_params import asked_new_tokens
from ..tokenizer import Tokenizer, encode_prompts
from .access import Client
from .config import ServerConfig
from .disconnects import unless_gone
from .record import Record
from .replies import HttpError

Result = dict[str, Any]
E = TypeVar("E", bound=BaseException)
T = TypeVar("T")
_LONG_TEXT = 1 << 16
"""Characters from which on text is made into tokens on a thread, so that others are not kept waiting."""
MAX_RID_CHARS = 200
GENERATE = "async_generate"


@dataclass(eq=False, slots=True)
class Call:
    """One request of a client that is being generated."""

    client: Client
    arguments: dict[str, Any]
    """Of `method`."""
    num_samples: int
    given: dict[str, str | None] = field(default_factory=dict)
    """The engine's id of each prompt -> the client's, None where it gave none."""
    method: str = GENERATE
    """The engine's call: this, or another one that answers with results in the same form."""

    def named(self, result: Result) -> Result:
        """`result` under the id that the client gave."""
        meta = result["meta_info"]
        base, dash, number = meta["id"], "", ""
        if base not in self.given:
            base, dash, number = meta["id"].rpartition("-")
        given = self.given.get(base)
        if given is not None:
            meta["id"] = f"{given}{dash}{number}"
        experts = meta.get("routed_experts")
        if experts is not None and not isinstance(experts, str):
            meta["routed_experts"] = base64.b64encode(experts.astype("<i4").tobytes()).decode()
            meta["routed_experts_shape"] = list(experts.shape)
        return result

    def told(self, error: E) -> E:
        """`error`, which may name a prompt by the engine's id of it, in words that the client understands."""
        text = str(error)
        for base, given in self.given.items():
            if given is not None and base in text:
                error.args = (text.replace(base, given),)
        return error


class ResultStream:
    """Cumulative results of a call as they come; closing it ends the call, whether anybody has begun to read or not."""

    def __init__(
        self,
        first: Result | None,
        rest: Any,
        seen: Callable[[Result], Result],
        dismiss: Callable[[], None],
    ) -> None:
        self._first = first
        self._rest = rest
        self._seen = seen
        self._dismiss = dismiss

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        first, self._first = self._first, None
        if first is not None:
            return self._seen(first)
        try:
            return self._seen(await anext(self._rest))
        except BaseException:  # Its end included.
            self._dismiss()
            raise

    async def aclose(self) -> None:
        """Safe to repeat; nobody may be reading."""
        self._dismiss()
        await self._rest.aclose()


class Calls:
    """All calls that run; used on the event loop alone."""

    def __init__(
        self, engine: Engine, config: ServerConfig, tokenizer: Tokenizer | None, record: Record
    ) -> None:
        self._engine = engine
        self._config = config
        self._tokenizer = tokenizer
        self._record = record
        self._running: set[Call] = set()
        self._by_rid: dict[tuple[str, str], set[str]] = {}
        self.num_samples = 0
        """Samples of all calls that run now."""
        self.ending: str | None = None
        """Why the server takes no calls any more; None: it does."""
        self._holders: set[object] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._sizes: dict[str, int] = {}

    # ---- what routes call ------------------------------------------------------------------------------------------

    async def whole(
        self, request: Request, client: Client, arguments: dict[str, Any], method: str = GENERATE
    ) -> Any:
        """As `Engine.async_generate`, or another call of its kind; the requests end when the client goes."""
        call = await self._admitted(client, arguments, method)
        try:
            found = await unless_gone(request, self._generate(call))
        except Exception as error:
            raise call.told(error) from None
        finally:
            self._dismiss(call)
        for result in found if isinstance(found, list) else [found]:
            self._finished(call, result)
        return found

    async def other(self, request: Request, num_samples: int, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which computes so many samples in its own way; it is cancelled when the client goes."""
        try:
            await self._let_in(num_samples)
        except BaseException:
            work.close()
            raise
        self._count(num_samples)
        try:
            return await unless_gone(request, work)
        finally:
            self._discount(num_samples)

    async def stream(
        self, request: Request, client: Client, arguments: dict[str, Any]
    ) -> ResultStream:
        """Cumulative results as they come. Returns when there is a first one: what is refused before is raised here."""
        call = await self._admitted(client, {**arguments, "stream": True})
        try:
            chunks = await self._engine.async_generate(**call.arguments)
            first = await unless_gone(request, _first(chunks))
        except BaseException as error:
            self._dismiss(call)
            raise call.told(error) from None
        return ResultStream(
            first, chunks, lambda chunk: self._seen(call, chunk), lambda: self._dismiss(call)
        )

    async def abort(self, client: Client, rid: str) -> int:
        """End the client's requests of this id (an admin's word: anybody's); returns how many ended."""
        owners = {name for name, _ in self._by_rid} if client.is_admin else {client.name}
        ids = [i for owner in owners for i in self._internal(owner, rid)]
        ended = [await self._engine.async_abort_request(i) for i in ids]
        return sum(ended)

    async def abort_all(self) -> int:
        """End everybody's requests."""
        return await self._engine.async_abort_request(abort_all=True)

    @asynccontextmanager
    async def held_back(self, patience_s: float) -> AsyncIterator[None]:
        """Within it nothing runs: what did has ended, and no new call begins.

        504 when it does not end in time, and 400 when somebody has let go meanwhile.
        """
        mine = object()
        self._holders.add(mine)
        self._open.clear()
        try:
            try:
                async with asyncio.timeout(patience_s):
                    await self._idle.wait()
            except TimeoutError:
                raise HttpError(
                    504, f"{self.num_samples:,} samples did not end within {patience_s:g} s"
                ) from None
            if mine not in self._holders:
                raise HttpError(400, "generation was resumed while the pause waited")
            yield
        finally:
            self._holders.discard(mine)
            if not self._holders:
                self._open.set()

    def let_go(self) -> None:
        """Whoever waits in `held_back` does so in vain; new calls begin."""
        self._holders.clear()
        self._open.set()

    @property
    def held(self) -> bool:
        """New calls wait, inside `held_back`."""
        return not self._open.is_set()

    async def drain(self, patience_s: float) -> None:
        """Take no new calls; let those that run finish within `patience_s` seconds, then abort them."""
        self.ending = "the server is shutting down"
        self._open.set()
        try:
            async with asyncio.timeout(patience_s):
                await self._idle.wait()
        except (
            TimeoutError
        ):  # The engine may have other clients, which are none of this server's business.
            ids = [i for call in self._running for i in call.given]
            await asyncio.gather(*(self._engine.async_abort_request(i) for i in ids))

    async def token_ids(
        self, texts: Sequence[str], add_special_tokens: bool | None, *, any_length: bool = False
    ) -> list[list[int]]:
        """Tokens of each text. One that is certainly too long for the context is refused before it is encoded, unless
        `any_length`."""
        size = sum(len(text) for text in texts if isinstance(text, str))
        if size < _LONG_TEXT:
            return encode_prompts(self._tokenizer, texts, add_special_tokens)
        context = None if any_length else await self.context_length()
        return await asyncio.to_thread(
            encode_prompts, self._tokenizer, texts, add_special_tokens, context_length=context
        )

    async def context_length(self) -> int:
        """Tokens that prompt and output may have together."""
        return await self._resolved("context_length")

    async def vocab_size(self) -> int:
        """How many token ids the model has, with or without text."""
        return await self._resolved("vocab_size")

    async def _resolved(self, name: str) -> int:
        if name not in self._sizes:
            status = await self._engine.async_status()
            self._sizes[name] = int(status.resolved[name] or 0)
        return self._sizes[name]

    async def room_for(self, num_prompt_tokens: int) -> int:
        """Tokens that may follow such a prompt."""
        status = await self._engine.async_status()
        pool = status.num_blocks * int(status.resolved["block_size"] or 0)
        return max(0, min(await self.context_length(), pool) - num_prompt_tokens)

    # ---- one call --------------------------------------------------------------------------------------------------

    async def _admitted(
        self, client: Client, arguments: dict[str, Any], method: str = GENERATE
    ) -> Call:
        """Check the limits and give the prompts ids of the engine's."""
        arguments = dict(arguments)
        prompts, is_list = await self._prompts(arguments)
        if len(prompts) > self._config.max_prompts:
            raise HttpError(
                413,
                f"got {len(prompts):,} prompts, expected at most {self._config.max_prompts:,}; send several requests",
            )
        num_samples = await self._check_size(arguments, prompts, 128 if method == GENERATE else 0)
        await self._let_in(num_samples)
        call = Call(client, arguments, num_samples, method=method)
        rids = _rids(arguments.get("rid"), len(prompts))
        ids = [uuid.uuid4().hex for _ in prompts]
        call.given = dict(zip(ids, rids, strict=True))
        arguments["rid"] = ids if is_list else ids[0]
        for i, rid in call.given.items():
            if rid is not None:
                self._by_rid.setdefault((client.name, rid), set()).add(i)
        self._running.add(call)
        self._count(num_samples)
        return call

    async def _let_in(self, num_samples: int) -> None:
        """503 and 429 for what cannot begin now; nothing may be awaited between this and `_count`."""
        if self.ending is None:
            await self._open.wait()
        if self.ending is not None:
            raise HttpError(503, f"{self.ending}; ask another one", {"retry-after": "5"})
        if self.num_samples + num_samples > self._config.max_running_samples:
            raise self._too_many(num_samples)

    def _count(self, num_samples: int) -> None:
        self.num_samples += num_samples
        self._record.started(num_samples)
        self._idle.clear()

    def _discount(self, num_samples: int) -> None:
        self.num_samples -= num_samples
        self._record.ended(num_samples)
        if not self.num_samples:
            self._idle.set()

    async def _prompts(self, arguments: dict[str, Any]) -> tuple[list[Any], bool]:
        """Prompts as token ids, text replaced by them, and whether there is a list of prompts."""
        prompt, ids = arguments.get("prompt"), arguments.get("input_ids")
        embeds = arguments.get("input_embeds")
        if embeds is not None:
            if prompt is not None or ids is not None:
                raise HttpError(
                    400, "got input_embeds beside text or input_ids, expected exactly one"
                )
            found, is_list = await asyncio.to_thread(read_embeds, embeds)
            arguments["input_embeds"] = found if is_list else found[0]
            return [[0] * rows.shape[0] for rows in found], is_list
        if (prompt is None) == (ids is None):
            got = "neither" if prompt is None else "both"
            raise HttpError(400, f"got {got} of text and input_ids, expected exactly one")
        if prompt is not None:
            is_list = isinstance(prompt, list)
            rows = await self.token_ids(
                prompt if is_list else [prompt], arguments.pop("add_special_tokens", None)
            )
            if is_list and not rows:  # No prompts, no results.
                return [], True
            del arguments["prompt"]
            arguments["input_ids"] = rows if is_list else rows[0]
            return rows, is_list
        if not isinstance(ids, list) or not ids:
            raise HttpError(400, "input_ids: got no tokens, expected a list of token ids")
        is_list = isinstance(ids[0], list)
        return (ids if is_list else [ids]), is_list

    async def _check_size(
        self, arguments: dict[str, Any], prompts: list[Any], new_tokens: int
    ) -> int:
        """Samples of the call, of `new_tokens` where it says nothing else; 413 where its tokens are too many.

        What is ill-typed is left to the engine's check.
        """
        context = await self.context_length()
        params = arguments.get("sampling_params")
        each = params if isinstance(params, list) else [params] * len(prompts)
        samples = tokens = 0
        for ids, own in zip(prompts, each, strict=False):
            asked = own if isinstance(own, dict) else {}
            n = _count(asked.get("n"), 1)
            length = len(ids) if isinstance(ids, list) else 0
            new = min(_count(asked_new_tokens(asked), new_tokens), max(0, context - length))
            samples += n
            tokens += length + n * new
        if tokens > self._config.max_call_tokens:
            raise HttpError(
                413,
                f"got {tokens:,} tokens of prompts and outputs in one request, expected at most "
                f"{self._config.max_call_tokens:,}; send several requests",
            )
        if samples > self._config.max_running_samples:
            raise HttpError(
                413,
                f"got {samples:,} samples in one request, expected at most {self._config.max_running_samples:,}; send "
                "several requests",
            )
        return samples

    def _too_many(self, num_samples: int) -> HttpError:
        return HttpError(
            429,
            f"got {num_samples:,} samples beside {self.num_samples:,} that are under way, expected at most "
            f"{self._config.max_running_samples:,} together; try again later",
            {"retry-after": "1"},
        )

    async def _generate(self, call: Call) -> Any:
        return await getattr(self._engine, call.method)(**call.arguments)

    def _seen(self, call: Call, chunk: Result) -> Result:
        if chunk["meta_info"]["finish_reason"] is not None:
            self._finished(call, chunk)
            return chunk
        return call.named(chunk)

    def _finished(self, call: Call, result: Result) -> None:
        call.named(result)
        reason = result["meta_info"]["finish_reason"]
        if self.ending is not None and reason is not None and reason["type"] == "abort":
            reason["message"] = self.ending
        self._record.finished(result)

    def _dismiss(self, call: Call) -> None:
        """The call is over, however it ended."""
        if not call.num_samples:
            return
        for i, rid in call.given.items():
            if rid is not None:
                same = self._by_rid.get((call.client.name, rid), set())
                same.discard(i)
                if not same:
                    self._by_rid.pop((call.client.name, rid), None)
        self._running.discard(call)
        self._discount(call.num_samples)
        call.num_samples = 0

    def _internal(self, owner: str, rid: str) -> list[str]:
        """The engine's ids behind a client's; `rid-1` may be a sample of `rid`."""
        found = sorted(self._by_rid.get((owner, rid), ()))
        base, _, number = rid.rpartition("-")
        if not found and number.isdigit():
            found = [f"{i}-{number}" for i in sorted(self._by_rid.get((owner, base), ()))]
        return found


async def _first(chunks: AsyncIterator[Result]) -> Result | None:
    return await anext(chunks, None)


def _count(value: Any, default: int) -> int:
    return value if type(value) is int and value >= 0 else default


def _rids(given: Any, num: int) -> list[str | None]:
    """The client's id of each prompt."""
    if given is None:
        return [None] * num
    rids = given if isinstance(given, list) else [given]
    if not all(isinstance(rid, str) and 0 < len(rid) <= MAX_RID_CHARS for rid in rids):
        raise InvalidRequestError(
            f"rid: expected text of 1 to {MAX_RID_CHARS} characters, one for each prompt"
        )
    if len(rids) != num:
        raise InvalidRequestError(f"rid: got {len(rids)}, expected one for each of {num} prompts")
    if len(set(rids)) != num:
        raise InvalidRequestError("rid: got the same one twice, expected another for each prompt")
    return list(rids)
