"""How long an executor waits for what, and the checks of the numbers that its users give."""

from __future__ import annotations

import enum
import math
import numbers
import time
from dataclasses import dataclass, fields
from typing import Any

LOOK = 1.0  # seconds between two looks at what may have stopped


class Default(enum.Enum):
    """What stands for the executor's own value, where None means none."""

    DEFAULT = "the executor's"


DEFAULT = Default.DEFAULT


@dataclass(frozen=True)
class Bounds:
    """Seconds that an executor waits for its workers; None waits for ever.

    A worker that exceeds one is named in the log, ended and started again, and its request fails with `WorkerHung` (or
    is given to another worker, see `retries`). What lives in this process (layout "inline") cannot be ended and has no
    bounds.

    Attributes:
        answer: for a sign of life. Workers give one every few seconds; one that is stopped (SIGSTOP) gives none, nor
            does one that calls C code which keeps Python's lock. None lets a worker be stopped in a debugger.
        load: for a worker to start and build its pipeline.
        first_step: from the start of a request to its first step, in which compilers run.
        step: from one step to the next, and from the last to the result: autoencoders decode in it.
        outage: in which no worker serves, until the requests that wait fail with `ExecutorBroken`, as do new ones.
            Workers are started again for as long as the executor lives, and then requests are taken again.
    """

    answer: float | None = 120.0
    load: float | None = 3600.0
    first_step: float | None = 3600.0
    step: float | None = 3600.0
    outage: float | None = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_seconds(field.name, getattr(self, field.name))


class Stillness:
    """For how long there was no sign of something, less the time in which this process was stopped itself."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._signed = False
        self._looked = time.monotonic()

    def sign(self) -> None:
        """There was one. Called by any thread."""
        self._signed = True

    def seconds(self) -> float:
        """Ask about every `LOOK` seconds, in one thread: of a longer time only as much is counted."""
        now = time.monotonic()
        signed, self._signed = self._signed, False
        self._seconds = 0.0 if signed else self._seconds + min(now - self._looked, 2 * LOOK)
        self._looked = now
        return self._seconds


def check_seconds(name: str, value: Any) -> None:
    """Refuses what is no number of seconds above 0, nor None.

    Raises:
        ValueError: the message names the argument.
    """
    if value is None:
        return
    if isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool) and 0 < float(value) < math.inf:
        return
    raise ValueError(f"{name}={value!r}: give a number of seconds above 0, or None for no bound")


def check_count(name: str, value: Any, least: int) -> None:
    """Refuses what is no whole number of at least `least`.

    Raises:
        ValueError: the message names the argument.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")
