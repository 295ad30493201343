"""A request: what `submit` gives back, and what the executor and its workers tell about it."""

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
    """How far a request is.

    step: denoising steps done, of the pipeline's current progress bar.
    total: its number of steps; None if the pipeline does not know.
    bar: which progress bar of the pipeline it is, from 1: Helios has one for each chunk of frames.
    """

    step: int
    total: int | None
    bar: int = 1


class Request(Future):  # type: ignore[type-arg]
    """A `concurrent.futures.Future` of a pipeline's output.

    Attributes:
        id: its number in the executor, from 1.
        progress: the newest `Progress`, None before the first step.
        timings: seconds of the pipeline's stages by name, once the result is there.
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
        self._interrupt: Callable[[], None] | None = None
        self._timer: threading.Timer | None = None

    def cancel(self) -> bool:
        """Cancels the request, also when it runs: its worker leaves the pipeline after the current step.

        Returns:
            Whether nothing will come of it; False if it was done already.
        """
        if super().cancel():
            return True
        # what Future does for one that waits, for one that runs
        with self._condition:
            if self._state != "RUNNING":
                return False
            self._state = "CANCELLED"
            self._condition.notify_all()
        self.set_running_or_notify_cancel()
        self._invoke_callbacks()  # type: ignore[attr-defined]
        self._leave()
        return True

    # What the executor calls

    def _wait(self) -> None:
        """Now it waits for a worker."""
        if self._queue_timeout is not None:
            self._start_timer(self._queue_timeout, self._expire_waiting)

    def _begin(self, interrupt: Callable[[], None]) -> bool:
        """Now it runs, and `interrupt` stops it; False if it was cancelled or has timed out before."""
        self._interrupt = interrupt  # before the looks below: who cancels after them finds it
        if not self._claim():
            return False
        if self._timeout is not None:
            self._start_timer(self._timeout, self._expire)
        return True

    def _give_up(self, error: BaseException) -> None:
        """It will not run any more, or never."""
        if self._claim():
            self._fail(error)

    def _claim(self) -> bool:
        """It waits no longer; False if it is done already, or was cancelled."""
        with self._condition:  # one of those who want it gets it
            if self._begun:  # this is another try
                return not self.done()
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
        with self._condition:  # no worker takes it between the look and the claim
            if self._begun or not self._claim():
                return
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
        if isinstance(result, OrderedDict):  # as every output class of diffusers is
            result.timings = timings  # type: ignore[attr-defined]
        self._forget_inputs()
        with contextlib.suppress(InvalidStateError):  # it was cancelled or has timed out meanwhile
            self.set_result(result)

    def _fail(self, error: BaseException) -> bool:
        self._forget_inputs()
        try:
            self.set_exception(error)
        except InvalidStateError:
            return False
        return True

    def _abandon(self) -> None:
        """In a forked child, where nobody works on it: whoever asks is told. Nothing of the parent's is called."""
        self._condition = threading.Condition()  # a thread of the parent's may hold the other
        self._waiters = []
        self._done_callbacks: list[Any] = []
        self._interrupt = self._timer = None
        self._fail(RuntimeError(f"request {self.id} runs in the parent of this process, which alone gets its result"))

    def _forget_inputs(self) -> None:
        self._arguments, self._keywords, self._packed = (), {}, None
