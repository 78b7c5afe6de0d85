"""What an engine offers to the receiver that lives in it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class WeightHost(Protocol):
    """Implemented by the engine. The receiver calls `between_steps` from its own thread, and everything else from
    inside such an action (on the engine loop's thread, between two steps). Two exceptions come from the receiver's
    thread: `release_outputs(True)` after an overlapped verification, and `weights_torn` with `release_outputs(False)`
    when that verification failed and no step boundary came to undo the update; all ranks then call them, and they take
    effect at one boundary of all. `named` may be called on both.
    """

    named: Callable[[str], AbstractContextManager[Any]]
    """The context of a phase of an update: "receive", "stage", "commit" or "verify"; a range in a profile."""

    def between_steps(
        self, action: Callable[[], T], timeout_s: float, name: str | None = None
    ) -> T:
        """Run `action` on the engine loop's thread between two steps, block until it has run, and return its result or
        raise its error. When no step boundary comes within `timeout_s`, raise `DeadlineExceeded`. Ranks that pass the
        same `name` run their actions at the same boundary."""

    def forgo(self, name: str) -> None:
        """The action that was, or is just being, handed to `between_steps` under this name is not wanted any more:
        unless it has begun it never will, and its `between_steps` raises. On rank 0, which decides for all. Any
        thread."""

    def unwritable(self) -> str | None:
        """Why parameters cannot be written at present (their memory was given back), or None. Any thread may ask."""

    def reading(self) -> AbstractContextManager[Any]:
        """While it is held, the memory of the parameters is not given back. Whoever reads them outside of a step
        boundary and of a session takes it first, and asks `unwritable` then."""

    def lend_kv_cache(self) -> None:
        """Keep the released memory of the KV cache free for an update until `return_kv_cache`; `WeightUpdateError`
        while it is not released. The receiver's thread, as the other one."""

    def return_kv_cache(self) -> None:
        """The KV cache may have its memory again."""

    def weights_written(self, version: int, label: str | None, kv_policy: str | None) -> None:
        """The resident bytes are those of `version`: refresh derived state and apply the KV policy (None: the engine's
        default). After a roll-back it comes with the previous version and "flush": nothing that was computed with the
        undone version may be used again."""

    def label_changed(self, label: str) -> None:
        """What serves is called `label` from now on; bytes and version are the same."""

    def hold_outputs(self) -> None:
        """Keep back every token that is sampled from now on."""

    def release_outputs(self, ok: bool) -> None:
        """End `hold_outputs`: hand the tokens out, or throw them away as if they had never been sampled."""

    def weights_torn(self, reason: str, version: int, label: str) -> None:
        """The resident bytes are a mixture: refuse to generate until the next `weights_written`. They are called by
        `version` and `label`, also where `weights_written` has told others before: what turned out wrong never served.
        """
