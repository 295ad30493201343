"""Requests: the futures that `submit` returns, and their progress."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

from wan_patches.pipelines.streaming import Chunk

logger = logging.getLogger("wan_patches")


@dataclass(frozen=True)
class Progress:
    """The progress of a request.

    step: denoising steps done in the pipeline's current progress bar.
    total: number of steps of that bar; None if the pipeline does not report it.
    bar: number of the pipeline's progress bar, from 1; Helios has one per chunk of frames.
    """

    step: int
    total: int | None
    bar: int = 1


class Request(Future):  # type: ignore[type-arg]
    """A `concurrent.futures.Future` of a pipeline's output.

    Attributes:
        id: number of the request in the executor, from 1.
        progress: latest `Progress`; None before the first step.
        timings: seconds of the pipeline's stages by name; filled in with the result.
    """

    def __init__(
        self,
        id: int,
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        *,
        seed: int | None = None,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        on_progress: Callable[[Request, Progress], None] | None = None,
        on_frames: Callable[[Request, Chunk], object] | None = None,
    ) -> None:
        super().__init__()
        self.id = id
        self.progress: Progress | None = None
        self.timings: dict[str, float] = {}
        self._arguments, self._keywords = arguments, keywords
        self._seed, self._timeout, self._queue_timeout, self._on_progress = seed, timeout, queue_timeout, on_progress
        self._on_frames = on_frames
        self._patches: dict[str, Any] | None = None
        self._packed: Any = None
        self._retries = 0
        self._begun = False
        self._has_expired = False
        self._interrupt: Callable[[], None] | None = None
        self._timer: threading.Timer | None = None

    def cancel(self) -> bool:
        """Cancels the request, even if it is running; its worker then leaves the pipeline after the current step.

        Returns:
            True if the request is cancelled; False if it was already done.
        """
        if super().cancel():
            return True
        # as Future does for a pending request, here for a running one
        with self._condition:
            if self._state != "RUNNING":
                return False
            self._state = "CANCELLED"
            self._condition.notify_all()
        self.set_running_or_notify_cancel()
        self._invoke_callbacks()  # type: ignore[attr-defined]
        self._leave()
        return True

    # Called by the executor

    def _wait(self) -> None:
        """Starts to wait for a worker."""
        if self._queue_timeout is not None:
            self._start_timer(self._queue_timeout, self._expire_waiting)

    def _begin(self, interrupt: Callable[[], None]) -> bool:
        """Starts to run; `interrupt` stops the run. Returns False if it was cancelled or timed out before."""
        self._interrupt = interrupt  # set before the checks below, for a cancellation after them
        if not self._claim():
            return False
        if self._timeout is not None:
            self._start_timer(self._timeout, self._expire)
        return True

    def _give_up(self, error: BaseException) -> None:
        """Fails a request that will not run, or not again."""
        if self._claim():
            self._fail(error)

    def _claim(self) -> bool:
        """Ends the wait. Returns False if the request is already done or was cancelled."""
        with self._condition:  # only one thread may claim it
            if self._begun:  # this is a retry
                return not (self._has_expired or self.done())
            if self._state == "FINISHED" or not self.set_running_or_notify_cancel():
                return False
            self._begun = True
        self._stop_timer()
        return True

    def _start_timer(self, seconds: float, call: Callable[[], None]) -> None:
        self._timer = threading.Timer(seconds, call)
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end_of_try(self) -> None:
        self._interrupt = None
        self._stop_timer()

    def _expire_waiting(self) -> None:
        with self._condition:  # so that no worker takes it between check and claim
            if self._begun or not self._claim():
                return
            self._has_expired = True  # until the failure below, it looks like a request that is retried
        bound = f"its queue_timeout of {self._queue_timeout} s"
        self._fail(TimeoutError(f"request {self.id} waited longer for a worker than {bound}"))

    def _expire(self) -> None:
        if self._fail(TimeoutError(f"request {self.id} took longer than its timeout of {self._timeout} s")):
            self._leave()

    def _leave(self) -> None:
        interrupt = self._interrupt
        if interrupt is not None:
            interrupt()

    def _advance(self, progress: Progress) -> None:
        self.progress = progress
        if self._on_progress is not None and not self.done():
            try:
                self._on_progress(self, progress)
            except Exception:
                logger.exception("the progress callback of request %d raised", self.id)

    @property
    def _streams(self) -> bool:
        return self._on_frames is not None

    def _hand_over(self, load: Callable[[], Any], start: int, reason: str | None) -> None:
        if self._on_frames is not None and not self.done():
            try:
                self._on_frames(self, Chunk(load(), start, reason))
            except Exception:
                logger.exception("the frames callback of request %d raised", self.id)

    def _succeed(self, result: Any, timings: dict[str, float]) -> None:
        self.timings = timings
        if isinstance(result, OrderedDict):  # as all output classes of diffusers are
            result.timings = timings  # type: ignore[attr-defined]
        self._forget_inputs()
        with contextlib.suppress(InvalidStateError):  # cancelled or timed out meanwhile
            self.set_result(result)

    def _fail(self, error: BaseException) -> bool:
        self._forget_inputs()
        try:
            self.set_exception(error)
        except InvalidStateError:
            return False
        return True

    def _abandon(self) -> None:
        """Fails the request in a forked child, where no worker runs it, without calling the parent's callbacks."""
        self._condition = threading.Condition()  # a thread of the parent may hold the inherited one
        self._waiters = []
        self._done_callbacks: list[Any] = []
        self._interrupt = self._timer = None
        self._fail(RuntimeError(f"request {self.id} runs in the parent process, which alone receives its result"))

    def _forget_inputs(self) -> None:
        self._arguments, self._keywords, self._packed = (), {}, None
