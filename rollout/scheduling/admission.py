"""What a request must be so that it can ever run."""

from __future__ import annotations

from collections.abc import Container, Sequence

from ..cache.kv_cache_manager import KVCacheManager
from ..errors import InvalidRequestError
from ..types import RequestStatus
from .request import Request


def check_new_requests(
    requests: Sequence[Request], rids_in_use: Container[str], kv: KVCacheManager
) -> None:
    """Raise `InvalidRequestError` for the first that can never run, even alone in an empty pool."""
    first, rids = requests[0], set()
    for request in requests:
        assert request.status is RequestStatus.NEW, "a request is added once"
        assert request.token_ids == first.token_ids, "a group shares its prompt"
        assert request.logprob_start_len == first.logprob_start_len, "and its input log-probs"
        if request.rid in rids_in_use or request.rid in rids:
            raise in_use(request.rid)
        rids.add(request.rid)
        if not request.num_prompt_tokens:
            raise InvalidRequestError(
                f"request {request.rid}: got an empty prompt, expected at least one token; "
                "start it with the beginning-of-sequence token"
            )
        most = request.params.max_new_tokens
        check_fits(request.rid, request.num_prompt_tokens, most, kv)


def check_fits(rid: str, num_prompt_tokens: int, max_new_tokens: int, kv: KVCacheManager) -> None:
    """Raise `InvalidRequestError` unless it can run alone in an empty pool."""
    # The last token that is drawn is never computed.
    longest = num_prompt_tokens + max(max_new_tokens - 1, 0)
    if kv.blocks_for(longest) > kv.num_blocks:
        raise InvalidRequestError(
            f"request {rid}: got {num_prompt_tokens} prompt tokens and max_new_tokens={max_new_tokens}, expected at "
            f"most {kv.num_blocks * kv.block_size} tokens, the size of the KV cache; shorten it or raise kv_cache_bytes"
        )


def in_use(rid: str) -> InvalidRequestError:
    """The error for an id that a request under way has."""
    return InvalidRequestError(
        f"request id: got {rid!r}, which is in use, expected a new one; "
        "wait for that request or leave `rid` out"
    )
