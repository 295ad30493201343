"""Schedules requests on groups of devices: a queue, and a thread per group that takes requests from it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

from wan_patches.executor import forks
from wan_patches.executor.bounds import LOOK, Bounds
from wan_patches.executor.errors import ExecutorBroken, WorkerDied
from wan_patches.executor.groups import Group, Unwanted
from wan_patches.executor.health import Health, State, WorkerHealth
from wan_patches.executor.requests import Request, logger
from wan_patches.executor.session import Interrupted

_LONGEST_PAUSE = 60.0  # maximum backoff in seconds between attempts to start a group
_STABLE = 60.0  # seconds of service after which a failed group restarts without backoff


@dataclass(eq=False)
class _Duty:
    """A group and its current state, which only the group's own thread changes."""

    group: Group
    state: State = "loading"
    since: float = field(default_factory=time.monotonic)
    request: Request | None = None
    restarts: int = 0
    failures: int = 0  # deaths and failed starts since the last finished request
    error: BaseException | None = None

    @property
    def serving(self) -> bool:
        return self.state in ("idle", "running")

    def pause(self) -> float:
        """Returns the backoff in seconds before the next start of the group: 0 after the first failure."""
        return 0.0 if self.failures < 2 else min(_LONGEST_PAUSE, 2.0 ** (self.failures - 2))


class Scheduler:
    """Runs the groups of an executor in threads, and queues requests for them."""

    def __init__(self, groups: Sequence[Group], bounds: Bounds, cancel_grace: float | None) -> None:
        """`cancel_grace`: see `ParallelExecutor`."""
        self.groups = list(groups)
        self._bounds, self._cancel_grace = bounds, cancel_grace
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._duties = [_Duty(group) for group in self.groups]
        self._begun = False  # every group has loaded its pipeline once
        self._closed = False  # no more requests are accepted
        self._ended = False  # and all earlier ones are cancelled
        self._inherited = False
        self._is_broken = False  # the outage limit is exceeded
        self._outage: threading.Timer | None = None
        for group in self.groups:
            group.on_death = self._look_again
        self._threads = [
            threading.Thread(target=self._serve, args=(duty,), name="wan-patches group", daemon=True)
            for duty in self._duties
        ]

    def start(self) -> None:
        """Waits until every group has loaded its pipeline. If one fails, ends all and raises its exception."""
        _schedulers.add(self)
        forks.watch(self)
        try:
            for thread in self._threads:
                thread.start()
            with self._changed:
                while not all(duty.serving for duty in self._duties):
                    for error in filter(None, (duty.error for duty in self._duties)):
                        raise error
                    self._changed.wait()
                self._begun = True
        except BaseException:  # Ctrl-C, too
            self.close()
            self.join()
            raise

    def check(self) -> None:
        """Raises if requests cannot be accepted: after shutdown, in a forked child, or during an outage."""
        if self._inherited:
            raise RuntimeError("this executor belongs to the parent process; create another one here")
        if self._closed:
            raise RuntimeError("this executor was shut down; create another one")
        if self._is_broken:
            raise self._broken()

    def add(self, request: Request) -> None:
        with self._changed:
            self.check()
            self._waiting.append(request)
            request._wait()
            self._changed.notify_all()

    def health(self) -> Health:
        """Returns the state of every worker, and the numbers of waiting and running requests."""
        with self._changed:
            if self._inherited:
                self.check()
            now, workers = time.monotonic(), []
            for duty in self._duties:
                for rank, device, pid in duty.group.members():
                    request = None if duty.request is None else duty.request.id
                    reason = None if duty.error is None else _told(duty.error)
                    workers.append(
                        WorkerHealth(rank, device, duty.state, now - duty.since, pid, request, duty.restarts, reason)
                    )
            waiting = sum(not request.done() for request in self._waiting)
            return Health(tuple(workers), waiting, sum(duty.request is not None for duty in self._duties))

    def _look_again(self) -> None:
        """Wakes the threads of idle groups after a worker has ended, so that each checks its group."""
        with self._changed:
            self._changed.notify_all()

    def close(self, cancel_waiting: bool = False) -> None:
        """Stops accepting requests; groups end after the last one."""
        with self._changed:
            self._closed = True
            cancelled = self._take_waiting() if cancel_waiting else []
            self._changed.notify_all()
        for request in cancelled:
            request.cancel()
            request._give_up(CancelledError())  # wakes waiting threads

    def cancel(self) -> None:
        """Cancels all requests, including running ones."""
        with self._changed:
            requests = self._requests()
        for request in requests:
            request.cancel()

    def end(self) -> None:
        """Cancels all requests and kills the workers; a pipeline in this process continues to its next step."""
        self._ended = True
        self.close(cancel_waiting=True)
        self.cancel()
        for group in self.groups:
            group.kill()

    def join(self) -> None:
        """Waits until all groups have ended."""
        for thread in self._threads:
            if thread is not threading.current_thread():  # a callback of a future may call shutdown
                thread.join()

    # Forks

    def before_fork(self) -> None:
        pass

    def after_fork_in_child(self) -> None:
        """Drops groups and threads, which belong to the parent: the child must not close, join or wait for them."""
        self._inherited = self._closed = True
        self._changed = threading.Condition()  # a thread of the parent may hold the inherited one
        for request in self._requests():
            request._abandon()
        self._outage = None
        for theirs in (self.groups, self._threads, self._waiting, self._duties):
            theirs.clear()

    # Called with the lock held

    def _requests(self) -> list[Request]:
        """Returns waiting and running requests."""
        return [*self._waiting, *(duty.request for duty in self._duties if duty.request is not None)]

    def _take_waiting(self) -> list[Request]:
        """Empties the queue and returns its requests."""
        taken, self._waiting = list(self._waiting), deque()
        return taken

    # Called in the thread of a group

    def _serve(self, duty: _Duty) -> None:
        try:
            self._start(duty)
            if duty.serving:
                while (request := self._next(duty)) is not None:
                    self._run(duty, request)
                    del request  # do not hold the result while waiting for the next request
        finally:
            if duty in self._duties:  # false in a child forked by a callback in this thread
                self._set(duty, "down")
                with contextlib.suppress(Exception):
                    duty.group.stop()

    def _set(self, duty: _Duty, state: State, request: Request | None = None) -> None:
        with self._changed:
            duty.state, duty.since, duty.request = state, time.monotonic(), request
            self._watch_for_outage()
            if not self._begun:  # the constructor is waiting
                self._changed.notify_all()

    def _is_over(self) -> bool:
        return self._closed and not self._waiting

    def _start(self, duty: _Duty) -> None:
        self._set(duty, "loading")
        try:
            duty.group.start(wanted=lambda: not self._is_over())
        except Unwanted as error:
            duty.error = error
        except BaseException as error:
            self._failed(duty, error, f"{duty.group.name} could not be started: ")
        else:
            self._set(duty, "idle")
            if duty.restarts:
                logger.warning("%s restarted; %s", duty.group.name, self._capacity())

    def _failed(self, duty: _Duty, error: BaseException, what: str = "") -> None:
        with self._changed:
            if duty.serving and time.monotonic() - duty.since > _STABLE:
                duty.failures = 0
            duty.failures += 1
            duty.error = error
            self._set(duty, "down")
            told, over, pause = self._begun and not self._ended, self._is_over(), duty.pause()
        if told:
            what += _told(error)
            again = f"; restarting {f'in {pause:g} s' if pause else 'now'}; {self._capacity()}"
            logger.warning("%s%s", what, "" if over else again)

    def _capacity(self) -> str:
        return f"{sum(duty.serving for duty in self._duties)} of {len(self._duties)} groups serving"

    def _next(self, duty: _Duty) -> Request | None:
        """Returns the next request once the group can serve it; None after shutdown."""
        while not self._is_over():
            if duty.serving:
                try:
                    duty.group.check()  # without the lock, since it ends hung workers
                except WorkerDied as error:
                    self._failed(duty, error)
            with self._changed:
                if not duty.serving:
                    self._changed.wait_for(self._is_over, duty.pause())
                elif self._waiting:
                    request = self._waiting.popleft()
                    self._set(duty, "running", request)
                    return request
                elif not self._closed:
                    self._changed.wait(LOOK)
            if not duty.serving and not self._is_over():
                duty.restarts += 1
                self._start(duty)
        return None

    def _run(self, duty: _Duty, request: Request) -> None:
        group = duty.group
        killers: list[threading.Timer] = []

        def interrupt() -> None:
            with self._changed:
                if duty.request is not request:  # it has just finished
                    return
                if self._cancel_grace is not None:
                    timer = threading.Timer(self._cancel_grace, overdue)
                    timer.daemon = True
                    killers.append(timer)
                    timer.start()
            group.interrupt(request.id)

        def overdue() -> None:
            logger.warning(
                "request %d was cancelled or timed out, but %s did not stop it within %g s; ending and restarting it",
                request.id,
                group.name,
                self._cancel_grace,
            )
            group.kill()

        again = False
        death: WorkerDied | None = None
        deliver: Callable[[], object] | None = None
        try:
            if request._begin(interrupt):
                deliver = functools.partial(request._succeed, *group.run(request))
        except Interrupted:  # cancelled or timed out; the future already has an outcome, and this has no effect
            deliver = functools.partial(request._fail, CancelledError())
        except WorkerDied as error:
            death = error
            again = request._retries > 0 and not request.done()
            if not again:
                deliver = functools.partial(request._fail, error)
        except BaseException as error:
            deliver = functools.partial(request._fail, error)
        request._end_of_try()
        with self._changed:
            for timer in killers:
                timer.cancel()
            if again:
                request._retries -= 1
                self._waiting.appendleft(request)
                self._changed.notify_all()
            if death is None:
                duty.failures, duty.error = 0, None
                self._set(duty, "idle")
        if death is not None:
            self._failed(duty, death, f"retrying request {request.id}: " if again else "")
        del death  # its traceback refers to this frame
        if deliver is not None:
            deliver()  # last, so that callbacks find the executor in its new state
        del deliver

    # Outages

    def _watch_for_outage(self) -> None:
        """Starts or stops the outage timer. Called with the lock held after a group has changed state."""
        if not self._begun:
            return
        if self._is_over() or any(duty.serving for duty in self._duties):
            if self._outage is not None:
                self._outage.cancel()
            self._outage, self._is_broken = None, False
        elif self._outage is None and self._bounds.outage is not None:
            self._outage = threading.Timer(self._bounds.outage, self._break)
            self._outage.daemon = True
            self._outage.start()

    def _break(self) -> None:
        """Fails waiting requests, and new ones until a group serves again, after the outage limit."""
        with self._changed:
            if self._outage is None or any(duty.serving for duty in self._duties):
                return
            self._is_broken = True
            abandoned = self._take_waiting()
            self._changed.notify_all()
        logger.error("%s; %d waiting requests fail", self._broken(), len(abandoned))
        for request in abandoned:
            request._give_up(self._broken())

    def _broken(self) -> ExecutorBroken:
        causes = [duty.error for duty in self._duties if duty.error is not None]
        error = ExecutorBroken(
            f"no worker has served for {self._bounds.outage:g} s; workers are being restarted, and requests are "
            "accepted again once one serves"
        )
        error.__cause__ = causes[-1] if causes else None
        return error


def _told(error: BaseException) -> str:
    return error.summary if isinstance(error, WorkerDied) else f"{type(error).__name__}: {error}".rstrip(": ")


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def finish_all() -> None:
    """Finishes all submitted requests before Python exits, as the standard library's executors do."""
    schedulers = list(_schedulers)
    for scheduler in schedulers:
        scheduler.close()
    for scheduler in schedulers:
        scheduler.join()
