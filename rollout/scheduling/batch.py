"""What one step computes, and who draws a token from it."""

import enum

import msgspec

from .request import Request


class ForwardMode(enum.Enum):
    """What kinds of items a step has."""

    IDLE = "idle"
    """None."""
    DECODE = "decode"
    """Requests that continue their output, one token each."""
    EXTEND = "extend"
    """Pieces of prompts."""
    MIXED = "mixed"
    """Both."""

    def is_decode(self) -> bool:
        """Nothing but decodes: what a captured graph can run."""
        return self is ForwardMode.DECODE

    def is_extend(self) -> bool:
        """There are pieces of prompts."""
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED)

    def is_idle(self) -> bool:
        """There is nothing to compute."""
        return self is ForwardMode.IDLE


class ScheduledItem(msgspec.Struct, frozen=True, gc=False):
    """Positions `start` to `start + length - 1` of one request; their blocks are owned when it is scheduled."""

    request: Request
    """Whose tokens are computed."""
    start: int
    """First position; equals the request's `num_computed` until `complete`."""
    length: int
    """Number of positions, at least one."""
    samples: bool
    """The last position's logits are wanted: it is the request's last known token."""
    input_logprobs: range | None = None
    """Positions (of the request) whose logits are wanted as input log-probabilities, position p for token p + 1."""

    @property
    def end(self) -> int:
        """First position after it."""
        return self.start + self.length


class ScheduledBatch(msgspec.Struct, frozen=True, gc=False):
    """One step. Tokens are packed in item order: item i's rows are contiguous."""

    items: list[ScheduledItem]
    """Decodes first (length 1), then prefill chunks; a request occurs once."""
    block_copies: list[tuple[int, int]]
    """(source, destination) blocks to copy, all layers, before this batch's forward; no destination is also a source
    or another pair's destination, so the order does not matter."""
    num_tokens: int
    """Sum of the items' lengths."""
    num_decodes: int
    """The first this many items are decodes: one token, at row i of item i."""

    @property
    def forward_mode(self) -> ForwardMode:
        """What kinds of items it has."""
        if not self.items:
            return ForwardMode.IDLE
        if self.num_decodes == len(self.items):
            return ForwardMode.DECODE
        return ForwardMode.MIXED if self.num_decodes else ForwardMode.EXTEND


class SampleRow(msgspec.Struct, frozen=True, gc=False):
    """One request whose known tokens are all computed."""

    item_index: int
    """Item whose last row's logits it draws from; samples of one prompt share an item for their first token."""
    request: Request
    """Who draws."""
    draws: bool
    """False: it asked for no token (`max_new_tokens=0`) and is to be finished."""
