"""How `HttpServerEngineAdapter` writes requests and reads answers."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import msgspec
import numpy as np
import torch

from weight_sync.layout.bucket import FlattenedTensorBucket, as_bucket
from weight_sync.layout.named_tensors import pairs_of
from weight_sync.report import SyncReport

from ..errors import ERRORS, DeadlineExceeded, EngineDiedError, RolloutError
from ..protocol.embeds import read_embeds

Result = dict[str, Any]
_TABLES = (
    *("output_top_logprobs", "input_top_logprobs"),
    *("output_token_ids_logprobs", "input_token_ids_logprobs"),
)


def pairs(tensors: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Named tensors from whatever callers have them in."""
    bucket = as_bucket(tensors)
    return pairs_of(tensors) if bucket is None else bucket.reconstruct_tensors()


def packed(tensors: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """The body of a request with these tensors, as one bucket."""
    bucket = FlattenedTensorBucket(named_tensors=tensors)
    metadata = [
        {
            "name": meta.name,
            "shape": list(meta.shape),
            "dtype": str(meta.dtype),
            "start_idx": meta.start_idx,
            "end_idx": meta.end_idx,
            "numel": meta.numel,
        }
        for meta in bucket.get_metadata()
    ]
    flat = bucket.get_flattened_tensor()
    return {"flattened_tensor": flat.numpy().data, "metadata": metadata}


def generate_body(arguments: dict[str, Any]) -> dict[str, Any]:
    """The body of `/generate` from the local names of `generate`."""
    body = {name: value for name, value in arguments.items() if name not in ("self", "others")}
    body |= arguments["others"]
    body["text"] = body.pop("prompt")
    if body.get("input_embeds") is not None:
        embeds, is_list = read_embeds(body["input_embeds"])
        body["input_embeds"] = embeds if is_list else embeds[0]
    return {name: value for name, value in body.items() if value is not None}


def to_json(body: Mapping[str, Any]) -> bytes:
    """JSON of a body, with tensors and arrays as lists."""
    return msgspec.json.encode(body, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # Tensors and arrays of token ids.
        return value.tolist()
    raise TypeError(f"got a {type(value).__name__}, expected plain values")


def event(line: str) -> Result:
    """The result in a server-sent event; raises the error that is in it."""
    found = msgspec.json.decode(line.removeprefix("data: "))
    if "error" in found and "meta_info" not in found:
        raise _error(found)
    result: Result = read_results(found)
    return result


class Answer(dict[str, Any]):
    """The object in an answer; what it lacks is the fault of whoever sent it."""

    def __missing__(self, key: str) -> Any:
        raise RolloutError(
            f"the server's answer has no {key!r}: it is another server, or one of another version than this adapter"
        )


def checked(reply: httpx.Response) -> Any:
    """The JSON of an answer; raises what the engine raised."""
    try:
        found = msgspec.json.decode(reply.content)
    except msgspec.DecodeError:
        raise RolloutError(
            f"{reply.request.url}: got {reply.status_code} and no JSON, expected a rollout server"
        ) from None
    if reply.status_code != 200:
        raise _error(found)
    return Answer(found) if isinstance(found, dict) else found


def _error(body: Any) -> Exception:
    detail = body.get("error") if isinstance(body, dict) else None
    detail = detail if isinstance(detail, dict) else {}
    cls = ERRORS.get(detail.get("class") or "", RolloutError)
    return cls(detail.get("message") or str(body))


def lost(url: str, error: httpx.HTTPError) -> Exception:
    """The error of a call that was not answered."""
    if isinstance(error, httpx.TimeoutException):
        return DeadlineExceeded(f"{url}: no answer in time ({type(error).__name__})")
    return EngineDiedError(f"{url}: {error or type(error).__name__}; is the server running?")


def sync_report(answer: dict[str, Any]) -> SyncReport:
    """What an update did."""
    return SyncReport(
        version=answer["weight_version_number"],
        label=answer["weight_version"],
        num_tensors=answer["num_tensors"],
        num_bytes=answer["num_bytes"],
        updated=answer["num_updated"],
        left=tuple(answer["left"]),
        transport="http",
        pause_s=answer["pause_s"],
        begin_to_verified_s=answer["seconds"],
        message=answer["message"],
    )


def plain(found: Any) -> Any:
    """An answer as a caller gets it."""
    return dict(found) if isinstance(found, Answer) else found


def read_results(found: Any) -> Any:
    """Log-probability entries are tuples, as in process; JSON has lists alone."""
    found = plain(found)
    for result in found if isinstance(found, list) else [found]:
        meta = result["meta_info"]
        for key in ("output_token_logprobs", "input_token_logprobs"):
            if key in meta:
                meta[key] = [tuple(entry) for entry in meta[key]]
        if "routed_experts" in meta:
            shape = meta.pop("routed_experts_shape")
            content = base64.b64decode(meta["routed_experts"])
            meta["routed_experts"] = np.frombuffer(content, dtype="<i4").reshape(shape).copy()
        for key in _TABLES:
            if key in meta:
                meta[key] = [row and [tuple(entry) for entry in row] for row in meta[key]]
    return found
