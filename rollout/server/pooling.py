"""What is computed of whole sequences: embeddings of any model, scores of a classifier such as a reward model.

`/encode` and `/classify` are the common dialect's: one answer for one input, a list for a list, and what was computed
under `embedding` in both. `/v1/embeddings` is the OpenAI API's, whose vectors have length 1.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from starlette.responses import Response

from .bodies import Body
from .generate import check_model
from .openai import prompt_ids
from .replies import HttpError, json_reply
from .routing import Ask, Route


class SequenceBody(Body):
    """Exactly one of `text` and `input_ids`, one sequence or a list."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    rid: str | list[str] | None = None
    """An id for `/abort_request`."""
    add_special_tokens: bool | None = None
    min_weight_version: int | None = None
    """Number of the oldest version of the weights that may compute it."""
    timeout_s: float | None = None


def _arguments(body: SequenceBody) -> dict[str, Any]:
    return {
        "prompt": body.text,
        "input_ids": body.input_ids,
        "rid": body.rid,
        "add_special_tokens": body.add_special_tokens,
        "min_weight_version": body.min_weight_version,
        "timeout_s": body.timeout_s,
    }


async def encode(ask: Ask) -> Response:
    """The hidden state of each sequence's last token, as it is."""
    calls, arguments = ask.state.calls, _arguments(ask.body)
    return json_reply(await calls.whole(ask.request, ask.client, arguments, "async_encode"))


async def classify(ask: Ask) -> Response:
    """A classifier's scores of each sequence, before any softmax."""
    arguments = {**_arguments(ask.body), "return_meta_info": True}
    found = await ask.state.calls.whole(ask.request, ask.client, arguments, "async_classify")
    return json_reply([_scored(r) for r in found] if isinstance(found, list) else _scored(found))


def _scored(result: dict[str, Any]) -> dict[str, Any]:
    return {"embedding": result["scores"], "meta_info": result["meta_info"]}


class EmbeddingsBody(Body):
    """`/v1/embeddings`."""

    input: str | list[str | int | list[int]] | None = None
    """Text or token ids, one sequence or several."""
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    """base64: of little-endian float32."""
    dimensions: int | None = None
    """Must be the model's own."""
    user: str | None = None
    """Has no effect."""
    rid: str | None = None
    """An id for `/abort_request`; several sequences are `rid.0`, `rid.1`."""
    add_special_tokens: bool | None = None
    min_weight_version: int | None = None


async def embeddings(ask: Ask) -> Response:
    """The hidden state of each sequence's last token, scaled to length 1."""
    body: EmbeddingsBody = ask.body
    model = check_model(ask, body.model)
    arguments = await prompt_ids(ask, "input", body.input, body.add_special_tokens, body.rid)
    arguments["min_weight_version"] = body.min_weight_version
    found = await ask.state.calls.whole(ask.request, ask.client, arguments, "async_encode")
    results = found if isinstance(found, list) else [found]
    vectors = [np.asarray(result["embedding"], dtype="<f4") for result in results]
    size = len(vectors[0])
    if body.dimensions not in (None, size):
        raise HttpError(400, f"dimensions: got {body.dimensions}, expected {size}, or none")
    num_tokens = sum(result["meta_info"]["prompt_tokens"] for result in results)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(v, body.encoding_format)}
        for i, v in enumerate(vectors)
    ]
    return json_reply(
        {
            "object": "list",
            "model": model,
            "data": data,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            "metadata": {"weight_version": results[-1]["meta_info"]["weight_version"]},
        }
    )


def _encoded(vector: np.ndarray, encoding: str) -> str | list[float]:
    unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if encoding == "base64":
        return base64.b64encode(unit.astype("<f4").tobytes()).decode()
    values: list[float] = unit.tolist()
    return values


ROUTES = (
    Route(path="/encode", handler=encode, body=SequenceBody, statuses=(429, 503)),
    Route(path="/classify", handler=classify, body=SequenceBody, statuses=(429, 503)),
    Route(
        path="/v1/embeddings",
        handler=embeddings,
        body=EmbeddingsBody,
        tag="openai",
        statuses=(404, 429, 503),
    ),
)
