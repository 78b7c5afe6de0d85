"""The engine loop: one ordered stream of commands, one step after another.

`EngineCore` runs on one thread of one process; which one is the executor's business. Between two steps it carries out
whatever has arrived, in order: requests, aborts, pauses, and the write of a weight update. That order is what makes a
commit atomic: no step ever sees it half done.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import torch

from weight_sync.errors import EngineDiedError
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.wire.rpc import Call

from ...config import ResolvedConfig
from ...errors import EngineClosedError, EngineStepError, RolloutError, typed
from ...layers.sampler import TokenSampler
from ...protocol import commands as cmd
from ...protocol.tick_messages import Boundary, Disarm, EndPause, Expire, Item, Tick
from ...runner.model_runner import ModelRunner
from ...scheduling.batch import ScheduledBatch
from ...scheduling.scheduler import Scheduler
from .admission import Admission
from .inbox import Inbox
from .memory import MemoryOccupation
from .memory_commands import MemoryCommands
from .opening import BACKLOG, PIECE, Opening
from .pipeline import StepPipeline
from .postprocess import Postprocessor
from .profiling import observers
from .rank_weights import connect_ranks
from .ranks import FOLLOW_S, HEARTBEAT_S, GroupAgreement, RankGroups, TickGroup
from .sample_state import GenerateGroup
from .throughput_log import ThroughputLog
from .ticks import Action, Boundaries, NullCall, TickLink, for_nobody
from .tuning import Tuning
from .watch import Watch
from .weight_host import EngineWeightHost, syncs_seen

logger = logging.getLogger(__name__)
T = TypeVar("T")

HARMLESS = (cmd.Generate, cmd.GetStatus)
"""Commands that may be carried out while the tokens of a step are pending."""


class EngineCore:
    """One rank's scheduler, runner and receiver; everything but `submit` and `between_steps` is the loop's.

    Rank 0 takes commands and shares its ticks with the other ranks; those take theirs from it and answer nobody.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: TokenSampler,
        admission: Admission,
        ranks: RankGroups,
    ) -> None:
        self._inbox = Inbox()
        self.config = config
        self.runner = runner
        self.scheduler = scheduler
        self.admission = admission
        self.post = Postprocessor(scheduler, runner, sampler)
        self.post.version = config.weight_version
        self.pipeline = StepPipeline(
            scheduler=scheduler,
            runner=runner,
            post=self.post,
            sampler=sampler,
            ahead=config.overlap,
            fail=self._fail_step,
            note=lambda batch, seconds: self._throughput.note(batch, seconds),
        )
        self.memory = MemoryOccupation(runner)
        self.host = EngineWeightHost(
            self,
            runner=runner,
            scheduler=scheduler,
            post=self.post,
            memory=self.memory,
            kv_policy=config.user.kv_policy,
            awaits_update=config.user.awaits_first_update,
        )
        self.receiver = WeightReceiver(
            runner.weight_map,
            self.host,
            keep_previous=config.user.keep_previous_weights,
            label=config.weight_version,
            torn=self.host.torn,
            agreement=GroupAgreement(ranks.weights, self.give_up),
        )
        interval_s = None if ranks.spec.rank > 0 else config.user.log_interval_s
        self._throughput = ThroughputLog(scheduler, interval_s, lambda: self.receiver.version)
        self.admission.engine_id = self.receiver.engine_id
        self._service = WeightService(self.receiver)
        self.weights = connect_ranks(self._service, ranks, self.give_up)
        self._ranks = ranks
        self._follows = ranks.spec.rank > 0
        self._ticks: TickLink = TickGroup(ranks.order)
        self._boundaries = Boundaries(patience_s=config.user.request_timeout_s)
        self._num_boundaries = 0
        self._thread: threading.Thread | None = None
        self._openings: deque[GenerateGroup] = deque()
        """Calls whose samples are not all requests yet."""
        self._held: dict[GenerateGroup, None] = {}  # Calls that wait for a later version.
        self._paused: cmd.PauseMode | None = None
        self._pause_ends = 0.0
        self._watch = Watch(config.user.progress_timeout_s)
        self._closed = threading.Event()
        self._asked_to_end: list[Call] = []
        self._ending: Exception = EngineClosedError("the engine was shut down; start a new one")
        self._handlers: dict[type, Callable[[Call], None]] = {
            cmd.Generate: self._generate,
            cmd.AbortRequests: self._abort,
            cmd.PauseGeneration: self._pause,
            cmd.ContinueGeneration: self._continue,
            cmd.FlushCache: self._flush,
            cmd.GetStatus: lambda call: call.reply(self.status()),
            cmd.Shutdown: self._shutdown,
            **MemoryCommands(
                self.memory, runner, scheduler, self.receiver, ranks.order, self._watch.moved
            ).handlers(),
            **Tuning(self.pipeline, scheduler).handlers(),
            **observers(self.pipeline, runner, self.host, ranks.spec.rank),
        }

    # ---- any thread ----------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Put a command into the order; returns at once. Weight messages go to the receiver's own thread."""
        if self._closed.is_set():
            call.fail(self._ending)
        elif type(call.body) in self._handlers:
            if isinstance(call.body, cmd.Generate):
                self._watch.asked(call)
            self._inbox.put_call(call)
        else:
            self.weights.handle(call)

    def give_up(self, error: Exception) -> None:
        """The ranks cannot go on together: on rank 0 the loop ends with `error`, and the other ranks' loops with it."""
        self._inbox.end(error)

    def local_channel(self) -> LocalChannel:
        """How a publisher in this process reaches an engine of one rank."""
        return LocalChannel(self._service)

    def between_steps(
        self, action: Callable[[], T], timeout_s: float, name: str | None = None
    ) -> T:
        """Run `action` on the loop's thread at the next step boundary and return what it returns.

        Raises `DeadlineExceeded` if the boundary does not come in time; then `action` never runs. `name`: where there
        are several ranks, each arms its own action under the same name, and all run them at the same place in the
        order; rank 0 must come last.
        """
        if threading.current_thread() is self._thread:
            return action()
        deadline = math.inf if self._follows else time.monotonic() + timeout_s
        armed = self._arm(action, name, deadline)
        # Other ranks run it, or give it up, when rank 0 does; they wait longer, lest they part ways with it.
        result: T = armed.wait(timeout_s + FOLLOW_S if self._follows else timeout_s)
        return result

    def forgo(self, name: str) -> None:
        """On rank 0: whoever waits, or is about to wait, in `between_steps` under this name wants it no more."""
        self._boundaries.cancel(name)

    def soon(self, action: Callable[[], None], name: str) -> None:
        """Run `action` now when this is the loop's thread, else between two steps, without waiting for it; ranks that
        pass the same name do so at the same place in the order, and all of them must."""
        if threading.current_thread() is self._thread:
            action()
        else:
            self._arm(action, name)

    def _arm(
        self, action: Callable[[], Any], name: str | None = None, deadline: float = math.inf
    ) -> Action:
        if name is None:
            self._num_boundaries += 1
            name = f"{threading.get_ident()}/{self._num_boundaries}"
        armed = Action(action, deadline)
        self._boundaries.arm(name, armed)
        if not self._follows:
            self._inbox.put(Boundary(name=name))
        return armed

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self, ends: Callable[[bool], None] = lambda failed: None) -> None:
        """Serve until `Shutdown`; the calling thread is the loop's. `ends(failed)` comes before all is closed."""
        self._thread = threading.current_thread()
        if self.runner.device.type == "cuda":
            torch.cuda.set_device(self.runner.device)  # of this thread
        if not self._follows:
            self._watch.start(self.post)
        try:
            while not self._closed.is_set():
                self.turn()
        except BaseException as error:
            self._fail_all(error)
            raise
        finally:
            failed = isinstance(self._ending, EngineDiedError)  # `_fail_all` has said so.
            ends(failed)
            self._close(lost=failed and self._ranks.spec.size > 1)

    def turn(self) -> None:
        """What comes before the next step, then the step."""
        items = self._next_tick()
        if not all(type(call.body) in HARMLESS for _, call in items):
            self.pipeline.drain()
        for item, call in items:
            self._carry_out(item, call)
        if items and self._held:
            self._let_go()
        self._open_some()
        if self._may_step and not self._closed.is_set():
            self.step()

    def _fail_all(self, error: BaseException) -> None:
        """The loop cannot go on: nobody must take what they have for a result."""
        why = f"the engine's loop ended with {type(error).__name__}: {error}; start a new engine"
        self._ending = died = EngineDiedError(why)
        self.post.fail_all(died)

    def step(self) -> bool:
        """Compute one batch and hand out tokens; False if there was nothing to do."""
        self._watch.begins()
        found = self.pipeline.step()
        if found:
            self._watch.moved()
        else:
            self._watch.idles()
        return found

    def _fail_step(self, batch: ScheduledBatch, error: Exception) -> None:
        """End the calls of a batch that could not be computed; the engine and all other calls go on."""
        if self.runner.tp.size > 1:
            raise error  # The ranks may have parted ways: only a new engine is sound.
        logger.exception("a step with %d requests failed", len(batch.items))
        failure = EngineStepError(
            f"the step failed: {type(error).__name__}: {error}; other requests go on"
        )
        for item in batch.items:
            self.post.fail(item.request.outputs.group, failure)

    @property
    def _may_step(self) -> bool:
        usable = self.host.torn is None and not self.memory.released
        return usable and self._paused is None and self.scheduler.has_work

    def _next_tick(self) -> list[tuple[Item, Call]]:
        """What comes before the next step; waits while there is nothing to compute."""
        if self._follows:
            return for_nobody(self._ticks.receive())
        items = self._due()
        busy = items or self._may_step or self._may_open
        taken = self._inbox.take(0.0 if busy else self._patience())
        items += [(item, call) for item, call in taken if self._watch.in_time(call)]
        items = [(self._still_wanted(item), call) for item, call in items]
        self._ticks.send(Tick(items=[item for item, _ in items]))
        return items

    def _still_wanted(self, item: Item) -> Item:
        """Whether a boundary is still wanted is decided once, by rank 0, for all ranks."""
        if isinstance(item, Boundary) and not self._boundaries.claim(item.name):
            return Disarm(name=item.name)
        return item

    def _carry_out(self, item: Item, call: Call) -> None:
        if isinstance(item, Boundary):
            self._boundaries.run(item.name)
        elif isinstance(item, Disarm):
            self._boundaries.disarm(item.name)
        elif isinstance(item, Expire):
            self._expire(item)
        elif isinstance(item, EndPause):
            logger.warning(
                "the lease of the pause (mode %s) ended; generation continues", self._paused
            )
            self._paused = None
            self._watch.moved()
        elif self._ranks.spec.size > 1 or self._watch.in_time(call):  # It waited for others.
            self._command(call)

    def _command(self, call: Call) -> None:
        if self._closed.is_set():
            call.fail(self._ending)
            return
        try:
            self._handlers[type(call.body)](call)
        except Exception as error:
            known = typed(error, type(call.body).__name__)
            if known is not error:
                logger.exception("%s failed", type(call.body).__name__)
            call.fail(known)

    # ---- clocks, on rank 0 -----------------------------------------------------------------------------------------

    def _due(self) -> list[tuple[Item, Call]]:
        """What the clock asks for now."""
        now = time.monotonic()
        due: list[Item] = []
        if self._paused is not None and now >= self._pause_ends:
            due.append(EndPause())
        groups = self.post.groups
        late = [number for number, group in groups.items() if now >= group.deadline]
        if late:
            due.append(Expire(numbers=late, why=f"{cmd.ENDED_LATE}{self._what_stops(now)}"))
        if groups and now >= self._watch.stalls_at:
            why = f"no step for {self._watch.patience_s:.3g} s{self._what_stops(now)}"
            due.append(Expire(numbers=[number for number in groups if number not in late], why=why))
        return [(item, NullCall(item)) for item in due]

    def _patience(self) -> float:
        """Seconds that the loop may sleep before a lease or a deadline needs it."""
        ends = [self._pause_ends] if self._paused is not None else []
        ends += [group.deadline for group in self.post.groups.values()]
        if self.post.groups:
            ends.append(self._watch.stalls_at)
        longest = HEARTBEAT_S if self._ranks.spec.size > 1 else 3600.0
        return min(max(0.0, min(ends) - time.monotonic()), longest) if ends else longest

    def _what_stops(self, now: float) -> str:
        """Why nothing is generated at present, as part of a message; empty: something is."""
        if self._paused is not None:
            left_s = max(0.0, self._pause_ends - now)
            end = time.strftime("%H:%M:%S UTC", time.gmtime(time.time() + left_s))
            return (
                f"; generation is paused by pause_generation(mode={self._paused!r}) until {end} (in {left_s:.3g} s): "
                "call continue_generation"
            )
        gone = ", ".join(sorted(self.memory.released))
        return f"; the memory of {gone} is released: resume it" if gone else ""

    def _expire(self, item: Expire) -> None:
        """End calls with what they have: whatever is finished or begun is worth something."""
        for group in [self.post.groups[n] for n in item.numbers if n in self.post.groups]:
            done = f"{group.num_finished} of {group.num_samples} samples had finished"
            if group.held:
                done = f"waited for weight version {group.min_version}, got {self.post.number}"
            self.post.abort_group(group, f"{item.why}; {done}")

    # ---- commands ------------------------------------------------------------------------------------------------

    def _generate(self, call: Call) -> None:
        self._watch.taken(call)
        least = call.body.min_weight_version
        held = least > self.post.number or (least > 0 and self.post.holding)
        if not held:
            self.host.check_whole()
        group = self.admission.open(call, self.scheduler, (*self._unmade, self.post))
        group.held = held
        if not self.post.groups:
            self._watch.moved()
        self.post.groups[group.number] = group
        if held:
            self._held[group] = None
        else:
            self._openings.append(group)

    @property
    def _may_open(self) -> bool:
        return bool(self._openings) and self.scheduler.num_waiting < BACKLOG

    def _let_go(self) -> None:
        """Calls whose version serves, or that have been ended, wait no longer."""
        whole = self.host.torn is None and not self.post.holding
        for group in self._held:
            group.held = not (whole and group.min_version <= self.post.number)
        free = [g for g in self._held if not g.held or g.opening is None or g.opening.over]
        self._openings.extend(free)
        for group in free:
            del self._held[group]

    def _open_some(self) -> None:
        """Make the next requests of the calls that have come first."""
        room = PIECE
        while room > 0 and self._may_open:
            group = self._openings[0]
            room -= self.post.open_some(group, room)
            if group.opening is None:
                self._openings.popleft()

    def _abort(self, call: Call) -> None:
        rids = None if call.body.abort_all else set(call.body.rids)
        groups = list(self.post.groups.values())
        nums = [self.post.abort_group(group, "aborted by the caller", rids) for group in groups]
        call.reply(cmd.Done(count=sum(nums)))

    def _pause(self, call: Call) -> None:
        body: cmd.PauseGeneration = call.body
        num = 0
        if body.mode == "abort":
            num = self.post.abort_all(
                "generation was paused (mode abort); resubmit prompt plus partial output"
            )
        elif body.mode == "retract":
            num = self.scheduler.num_running
            self.scheduler.retract_all()
        self._paused = body.mode
        self._pause_ends = time.monotonic() + body.lease_s
        call.reply(cmd.Done(count=num))

    def _continue(self, call: Call) -> None:
        self._paused = None
        self._watch.moved()
        call.reply(cmd.Done())

    def _flush(self, call: Call) -> None:
        held = sum(group.opening.num_left for group in self._held if group.opening is not None)
        pending = self.scheduler.num_running + self._num_waiting - held
        if call.body.recompute:
            self.scheduler.recompute_all()
        elif pending:
            raise RolloutError(
                f"cannot flush the cache: got {pending} pending requests, expected none; wait for them, abort them, "
                "or push weights with kv_policy='flush'"
            )
        self.scheduler.kv.flush()
        call.reply(cmd.Done())

    @property
    def _num_waiting(self) -> int:
        return self.scheduler.num_waiting + sum(opening.num_left for opening in self._unmade)

    @property
    def _unmade(self) -> list[Opening]:
        groups = (*self._openings, *self._held)
        return [group.opening for group in groups if group.opening is not None]

    def status(self) -> cmd.Status:
        """Counts, versions and sizes as of now."""
        resolved = msgspec.to_builtins(self.config)
        user = resolved.pop("user")
        kv = self.scheduler.kv
        return cmd.Status(
            weight_version=self.post.version,
            version=self.receiver.version,
            torn=self.receiver.torn,
            paused=self._paused,
            pause_left_s=None if self._paused is None else self._pause_ends - time.monotonic(),
            released=sorted(self.memory.released),
            num_running=self.scheduler.num_running,
            num_waiting=self._num_waiting,
            num_free_blocks=kv.num_available,
            num_blocks=self.config.num_blocks,
            resolved={**user, **resolved, **msgspec.to_builtins(self.scheduler.config)},
            pid=self.admission.pid,
            engine_id=self.receiver.engine_id,
            num_decoded_tokens=self._throughput.num_decoded,
            num_prompt_tokens=self._throughput.num_prompt,
            step_counts=list(self._throughput.step_counts),
            step_s=self._throughput.step_s,
            syncs=syncs_seen(self.receiver.recent),
        )

    def _shutdown(self, call: Call) -> None:
        self._asked_to_end.append(call)
        self._closed.set()

    def _close(self, lost: bool = False) -> None:
        """End what is left; after this `submit` refuses. lost: other ranks may be gone; all goes with the process."""
        self._closed.set()
        self._watch.close()
        self._boundaries.close(EngineDiedError(str(self._ending)))
        self.post.release(False)
        self.post.abort_all("the engine was shut down")
        for group in (*self._openings, *self._held):
            while group.opening is not None:  # Those end as soon as they are made.
                self.post.open_some(group, PIECE)
        self._inbox.drain(lambda call: call.fail(self._ending))
        for call in self._asked_to_end:  # Last of all: whoever is told that it ends hangs up.
            call.reply(cmd.Done())
        # What frees a GPU's memory waits for kernels, and they may for a rank that is gone.
        if not lost:
            self.weights.close()
            self.memory.end(alone=self._ranks.spec.size == 1 and self._service.ended)
            self._ranks.close()
        self._inbox.drain(lambda call: call.fail(self._ending))
