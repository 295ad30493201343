"""Who works on what: a queue of requests, and a thread for each group of devices that takes from it."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError

from wan_patches.executor import forks
from wan_patches.executor.errors import ExecutorBroken, WorkerDied
from wan_patches.executor.groups import Group
from wan_patches.executor.requests import Request, logger
from wan_patches.executor.session import Interrupted

_STARTS = 3  # times in a row that a group may fail to start before it is given up
_PAUSE = 1.0  # seconds between them


class Crew:
    """The groups of an executor, their threads and the requests that wait."""

    def __init__(self, groups: Sequence[Group], patience: float) -> None:
        self.groups = list(groups)
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._running: dict[Group, Request] = {}
        self._lost: dict[Group, BaseException] = {}
        self._started: dict[Group, BaseException | None] = {}
        self._closed = False
        self._inherited = False
        for group in self.groups:
            group.on_death = self._look_again
        self._threads = [
            threading.Thread(target=self._serve, args=(group,), name="wan-patches group", daemon=True)
            for group in self.groups
        ]

    def start(self) -> None:
        """Waits until every group has its pipeline; if one cannot have it, ends all and raises what it raised."""
        _crews.add(self)
        forks.watch(self)
        try:
            for thread in self._threads:
                thread.start()
            with self._changed:
                while len(self._started) < len(self.groups) and not any(self._started.values()):
                    self._changed.wait()
                for error in filter(None, self._started.values()):
                    raise error
        except BaseException:  # Ctrl-C, too
            self.close()
            for group in self.groups:
                group.kill()
            self.join()
            raise

    def check(self) -> None:
        """Raises what a request given now would meet."""
        if self._inherited:
            raise RuntimeError("this executor belongs to the parent of this process; make another one here")
        with self._changed:
            if self._closed:
                raise RuntimeError("this executor was shut down; make another one")
            if len(self._lost) == len(self.groups):
                raise _broken(next(iter(self._lost.values())))

    def add(self, request: Request) -> None:
        with self._changed:
            self.check()
            self._waiting.append(request)
            self._changed.notify_all()

    def _look_again(self) -> None:
        """A worker has ended: whoever waits for requests sees whether it was theirs."""
        with self._changed:
            self._changed.notify_all()

    def close(self, cancel_waiting: bool = False) -> None:
        """Takes no more requests; groups end when the last is done."""
        with self._changed:
            self._closed = True
            cancelled = list(self._waiting) if cancel_waiting else []
            self._changed.notify_all()
        for request in cancelled:
            request.cancel()

    def cancel(self) -> None:
        """Cancels all requests, those that run too."""
        with self._changed:
            requests = [*self._waiting, *self._running.values()]
        for request in requests:
            request.cancel()

    def join(self) -> None:
        """Waits until all groups have ended."""
        for thread in self._threads:
            if thread is not threading.current_thread():  # a callback of a future may shut down
                thread.join()

    # Forks

    def before_fork(self) -> None:
        pass

    def after_fork_in_child(self) -> None:
        """The groups and the threads are the parent's: here nothing is left to close, to join or to wait for."""
        self._inherited = self._closed = True
        self._changed = threading.Condition()  # a thread of the parent's may hold the other
        for request in [*self._waiting, *self._running.values()]:
            request._abandon()
        for theirs in (self.groups, self._threads, self._waiting, self._running):
            theirs.clear()

    # In the thread of a group

    def _serve(self, group: Group) -> None:
        try:
            self._start(group, tries=1)
            while group not in self._lost and (request := self._next(group)) is not None:
                self._run(group, request)
                del request  # this thread may wait long for another, and must not hold the result
        finally:
            if group in self.groups:  # not in a child that was forked in this thread, by a callback
                with contextlib.suppress(Exception):
                    group.stop()

    def _start(self, group: Group, tries: int) -> None:
        error: BaseException | None = None
        for left in reversed(range(tries)):
            try:
                group.start()
            except BaseException as problem:
                error = problem
                if group in self._started:  # else the constructor raises it
                    logger.warning("workers could not be started again: %s", problem)
            else:
                error = None
                break
            if left:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, _PAUSE)
        with self._changed:
            self._started.setdefault(group, error)
            if error is not None:
                self._lost[group] = error
            self._changed.notify_all()
            abandoned = list(self._waiting) if len(self._lost) == len(self.groups) else []
            self._waiting = deque(request for request in self._waiting if request not in abandoned)
        for request in abandoned:
            request._give_up(_broken(error))

    def _next(self, group: Group) -> Request | None:
        """The next request for a group that is ready for it; None when there will be none."""
        while group not in self._lost:
            with self._changed:
                if self._closed and not self._waiting:
                    return None
                if group.alive():
                    if self._waiting:
                        self._running[group] = request = self._waiting.popleft()
                        return request
                    self._changed.wait()
                    continue
            self._start(group, tries=_STARTS)
        return None

    def _run(self, group: Group, request: Request) -> None:
        killers: list[threading.Timer] = []

        def interrupt() -> None:
            with self._changed:
                if self._running.get(group) is not request:  # it has just ended
                    return
                timer = threading.Timer(self._patience, group.kill)
                timer.daemon = True
                killers.append(timer)
                timer.start()
            group.interrupt(request.id)

        again = False
        try:
            if not request._begin(interrupt):
                return
            result, timings = group.run(request)
            request._succeed(result, timings)
        except Interrupted:
            request._fail(CancelledError())  # it was cancelled or has timed out, and nothing comes of this
        except WorkerDied as error:
            again = request._retries > 0 and not request.done()
            if again:
                logger.warning("request %d is tried again: %s", request.id, error)
                request._retries -= 1
            else:
                request._fail(error)
        except BaseException as error:
            request._fail(error)
        finally:
            request._end_of_try()
            with self._changed:
                self._running.pop(group, None)
                for timer in killers:
                    timer.cancel()
                if again:
                    self._waiting.appendleft(request)
                    self._changed.notify_all()


def _broken(cause: BaseException | None) -> ExecutorBroken:
    error = ExecutorBroken("no worker is left, and none could be started again; make another executor")
    error.__cause__ = cause
    return error


_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


@atexit.register
def finish_all() -> None:
    """What the standard library's executors do: requests that were submitted are done before Python ends."""
    crews = list(_crews)
    for crew in crews:
        crew.close()
    for crew in crews:
        crew.join()
