"""An engine's surface over HTTP, for a trainer elsewhere."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Self

import httpx

from weight_sync.wire.cancellation import threaded

from ..errors import EngineClosedError
from .adapter_weights import HttpWeightCalls
from .adapter_wire import (
    Result,
    checked,
    event,
    generate_body,
    lost,
    plain,
    read_results,
    to_json,
)


class HttpServerEngineAdapter(HttpWeightCalls):
    """What trainers call, answered by a server of `rollout serve`; `Engine` says what arguments mean.

    Any thread may call; `async_generate` and the other `async_` twins belong to whatever event loop awaits them. Errors
    have the types that the engine raised. Results are those of `Engine`.

    url: of the server, such as "http://10.0.0.5:30000".
    api_key: where it wants one; updates, pauses and memory need the admin's.
    timeout_s: deadline of a call, in seconds; `generate` has none unless it is given one.
    bucket_bytes: tensors travel in requests of about so many bytes.
    verify: certificates, as of httpx.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        bucket_bytes: int = 512 << 20,
        verify: bool | str = True,
    ) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._in_session = False
        self._closed = False
        self._client = httpx.Client(**self._options())
        self._async_clients: weakref.WeakKeyDictionary[Any, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    # ---- generation ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        image_data: None = None,
        audio_data: None = None,
        video_data: None = None,
        return_logprob: Any = False,
        logprob_start_len: Any = -1,
        top_logprobs_num: Any = 0,
        token_ids_logprob: Any = None,
        **others: Any,
    ) -> Any:
        """Complete prompts; with `stream=True` an iterator of cumulative results."""
        body = generate_body(locals())
        if body.get("stream"):
            return self._stream(body)
        return read_results(self._post("/generate", body, timeout_s=None))

    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        image_data: None = None,
        audio_data: None = None,
        video_data: None = None,
        return_logprob: Any = False,
        logprob_start_len: Any = -1,
        top_logprobs_num: Any = 0,
        token_ids_logprob: Any = None,
        **others: Any,
    ) -> Any:
        """As `generate`, awaitable; with `stream=True` an asynchronous iterator. Cancelling it aborts the requests."""
        body = generate_body(locals())
        if body.get("stream"):
            return self._async_stream(body)
        try:
            reply = await self._async_client.post("/generate", content=to_json(body), timeout=None)
        except httpx.HTTPError as error:
            raise lost(self.url, error) from error
        return read_results(checked(reply))

    def score(
        self,
        query: str | Sequence[int],
        items: str | Sequence[Any],
        label_token_ids: Sequence[int],
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """Probability of each label token after query + item, one row per item."""
        body = {
            "query": query,
            "items": items,
            "label_token_ids": label_token_ids,
            "apply_softmax": apply_softmax,
            "item_first": item_first,
        }
        rows: list[list[float]] = self._post("/v1/score", body)["scores"]
        return rows

    async_score = threaded(score)

    def encode(
        self, prompt: str | Sequence[str] | None = None, *, input_ids: Any = None, **options: Any
    ) -> Any:
        """The hidden state of each sequence's last token."""
        body = {"text": prompt, "input_ids": input_ids, **options}
        return plain(self._post("/encode", body, timeout_s=None))

    async_encode = threaded(encode)

    def classify(
        self, prompt: str | Sequence[str] | None = None, input_ids: Any = None, **options: Any
    ) -> list[Any]:
        """A classifier's scores of each sequence: one number, or a list where there are several labels."""
        found = self._post(
            "/classify", {"text": prompt, "input_ids": input_ids, **options}, timeout_s=None
        )
        rows = [row["embedding"] for row in (found if isinstance(found, list) else [found])]
        return [row[0] if len(row) == 1 else row for row in rows]

    async_classify = threaded(classify)

    # ---- control ---------------------------------------------------------------------------------------------------

    def pause_generation(self, mode: Any = "abort", lease_s: float | None = None) -> int:
        """Stop generating until `continue_generation`; returns how many requests it touched."""
        num: int = self._post("/pause_generation", {"mode": mode, "lease_s": lease_s})[
            "num_requests"
        ]
        return num

    def continue_generation(self) -> None:
        """End a pause."""
        self._post("/continue_generation", {})

    def abort_request(self, rid: str | None = None, abort_all: bool = False) -> int:
        """End requests early; returns how many ended."""
        num: int = self._post("/abort_request", {"rid": rid, "abort_all": abort_all})[
            "num_requests"
        ]
        return num

    def flush_cache(self, recompute: bool = False) -> None:
        """Drop all cached prefixes; `RolloutError` while requests are pending."""
        self._post("/flush_cache", {"recompute": recompute})

    def release_memory_occupation(
        self, tags: Sequence[Any] | None = None, keep_weights: bool = False
    ) -> dict[str, Any]:
        """Give memory back to the system; `tags` and `num_bytes` of what changed."""
        return self._changed("/release_memory_occupation", tags, keep_weights=keep_weights)

    def resume_memory_occupation(self, tags: Sequence[Any] | None = None) -> dict[str, Any]:
        """Make released memory usable again."""
        return self._changed("/resume_memory_occupation", tags)

    def slow_down(self, forward_sleep_time: float | None) -> None:
        """Wait so many seconds before every step; None or 0 ends it."""
        self._post("/slow_down", {"forward_sleep_time": forward_sleep_time})

    def set_internal_state(self, server_args: Mapping[str, Any]) -> None:
        """Change options of the running engine."""
        self._post("/set_internal_state", {"server_args": dict(server_args)})

    def get_server_info(self) -> dict[str, Any]:
        """The resolved configuration, sizes and counts."""
        info: dict[str, Any] = plain(self._get("/server_info"))
        return info

    def get_model_info(self) -> dict[str, Any]:
        """Which model serves."""
        info: dict[str, Any] = plain(self._get("/model_info"))
        return info

    def shutdown(self) -> None:
        """Close the connections; the server goes on."""
        self._closed = True
        self._client.close()

    async_slow_down = threaded(slow_down)
    async_set_internal_state = threaded(set_internal_state)
    async_pause_generation = threaded(pause_generation)
    async_continue_generation = threaded(continue_generation)
    async_abort_request = threaded(abort_request)
    async_flush_cache = threaded(flush_cache)
    async_release_memory_occupation = threaded(release_memory_occupation)
    async_resume_memory_occupation = threaded(resume_memory_occupation)
    async_get_server_info = threaded(get_server_info)
    async_get_model_info = threaded(get_model_info)

    async def async_shutdown(self) -> None:
        """As `shutdown`, and closes the connections of this event loop."""
        client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()
        self.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # ---- below the surface -----------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "headers": {**self._headers, "content-type": "application/json"},
            "timeout": self._timeout_s,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
            "verify": self._verify,
            "trust_env": False,
        }

    @property
    def _async_client(self) -> httpx.AsyncClient:
        if self._closed:
            raise EngineClosedError("the connection was shut down; make a new adapter")
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            self._async_clients[loop] = httpx.AsyncClient(**self._options())
        return self._async_clients[loop]

    def _get(self, path: str) -> Any:
        return self._send("GET", path)

    def _post(self, path: str, body: Mapping[str, Any], timeout_s: float | None = -1.0) -> Any:
        limit = self._timeout_s if timeout_s == -1.0 else timeout_s
        return self._send("POST", path, content=to_json(body), timeout=limit)

    def _send(self, method: str, path: str, **options: Any) -> Any:
        if self._closed:
            raise EngineClosedError("the connection was shut down; make a new adapter")
        try:
            return checked(self._client.request(method, path, **options))
        except httpx.HTTPError as error:
            raise lost(self.url, error) from error

    def _stream(self, body: dict[str, Any]) -> Iterator[Result]:
        try:
            with self._client.stream(
                "POST", "/generate", content=to_json(body), timeout=None
            ) as reply:
                if reply.status_code != 200:
                    reply.read()
                    checked(reply)
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        yield event(line)
        except httpx.HTTPError as error:
            raise lost(self.url, error) from error

    async def _async_stream(self, body: dict[str, Any]) -> AsyncIterator[Result]:
        try:
            async with self._async_client.stream(
                "POST", "/generate", content=to_json(body), timeout=None
            ) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    checked(reply)
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        yield event(line)
        except httpx.HTTPError as error:
            raise lost(self.url, error) from error

    def _changed(self, path: str, tags: Sequence[Any] | None, **more: Any) -> dict[str, Any]:
        answer = self._post(path, {"tags": None if tags is None else list(tags), **more})
        return {"tags": answer["tags"], "num_bytes": answer["num_bytes"]}
