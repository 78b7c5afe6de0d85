"""An explicit session of a publisher, as its `with` block sees it."""

from collections.abc import Callable

from ..layout.named_tensors import NamedTensors
from ..report import SyncReport


class PublishSession:
    """What `WeightPublisher.session` yields."""

    def __init__(self, send: Callable[[NamedTensors], SyncReport]) -> None:
        self._send = send
        self.report: SyncReport | None = None
        """The commit's report, after the block has ended."""

    def send(self, named_tensors: NamedTensors) -> SyncReport:
        """As `WeightPublisher.send`."""
        return self._send(named_tensors)
