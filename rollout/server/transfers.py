"""Weight routes of the servers that trainers start themselves: a folder is loaded, the rest is refused with a way out.

prime-rl's servers have `/update_weights` with a folder; vLLM's have it between a start and an end, for the tensors of
its own transfers, which another engine cannot take part in: its communicators are NCCL's without torch, its handles of
GPU memory are pickles.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from starlette.responses import Response

from .bodies import AnyBody, Body
from .replies import HttpError, not_implemented
from .routing import Ask, Handler, Route
from .weights import from_disk

_INSTEAD = (
    "publish with a WeightPublisher at the engine's address, or send /init_weights_update_group and "
    "/update_weights_from_distributed, or a folder"
)
_MERGED = "LoRA adapters are not supported; publish the merged weights"


class UpdateBody(Body):
    """A folder of the engine's host."""

    weight_dir: str | None = None
    """A safetensors folder; it must cover every parameter. Its last name becomes the version's label."""
    weight_version: str | int | None = None
    """A label of its own."""
    skip_prefix_cache_reset: bool = False
    """Has no effect: prefixes of older weights are never read."""
    reset_prefix_cache: bool = True
    """The same."""
    update_info: dict[str, Any] | None = None
    """Refused: a part of one of vLLM's transfers."""


async def update_weights(ask: Ask) -> Response:
    """Load a safetensors folder of this host (`weight_dir`), as prime-rl's filesystem broadcast asks."""
    body: UpdateBody = ask.body
    if body.update_info is not None:
        raise not_implemented(f"update_info: got a vLLM transfer, expected weight_dir; {_INSTEAD}")
    if not body.weight_dir:
        raise HttpError(400, "weight_dir: got none, expected a safetensors folder of this host")
    label = body.weight_version or PurePath(body.weight_dir).name
    return await from_disk(ask, body.weight_dir, weight_version=label)


def _refuses(path: str, what: str) -> Route:
    async def refused(ask: Ask) -> Response:
        raise not_implemented(f"{path}: {what}")

    refused.__name__ = "not_here"
    refused.__doc__ = "Refused; the answer says what to do instead."
    handler: Handler = refused
    return Route(
        path=path, handler=handler, body=AnyBody, hands_on=True, admin=True, statuses=(501,)
    )


_TRANSFERS = (
    *("/init_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update"),
    *("/finish_weight_update", "/fetch_weights", "/init_broadcaster"),
    "/init_weight_update_communicator",
)
_ADAPTERS = (
    *("/load_lora_adapter", "/unload_lora_adapter"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/skyrl/v1/load_lora_adapter"),
)
ROUTES = (
    Route(
        path="/update_weights",
        handler=update_weights,
        body=UpdateBody,
        update=True,
        admin=True,
        statuses=(501,),
    ),
    *(_refuses(path, _INSTEAD) for path in _TRANSFERS),
    *(_refuses(path, _MERGED) for path in _ADAPTERS),
)
