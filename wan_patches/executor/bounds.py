"""Time limits of an executor, and validation of numeric options."""

from __future__ import annotations

import enum
import math
import numbers
import time
from dataclasses import dataclass, fields
from typing import Any

LOOK = 1.0  # polling interval in seconds for workers that may have stopped


class Default(enum.Enum):
    """Sentinel for the executor's own value, for options where None means no limit."""

    DEFAULT = "the executor's"


DEFAULT = Default.DEFAULT


@dataclass(frozen=True)
class Bounds:
    """Time limits of an executor for its workers, in seconds; None waits forever.

    A worker that exceeds a limit is named in the log, ended and started again. Its request fails with `WorkerHung`, or
    moves to another worker (see `retries`). A pipeline in this process (layout "inline") cannot be ended and has no
    limits.

    Attributes:
        answer: maximum time between heartbeats. Workers send one every few seconds, except when they are stopped
            (SIGSTOP) or call C code that holds the GIL. None allows stopping a worker in a debugger.
        load: time for a worker to start and build its pipeline.
        first_step: time from the start of a request to its first step, which includes compilation.
        step: time from one step to the next, and from the last step to the result, which includes decoding.
        outage: time without any serving worker after which waiting and new requests fail with `ExecutorBroken`.
            Workers are still started again while the executor lives; requests are accepted again once one serves.
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
    """Measures the time since the last sign, excluding time during which this process itself was stopped."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._signed = False
        self._looked = time.monotonic()

    def sign(self) -> None:
        """Records a sign. Any thread may call this."""
        self._signed = True

    def seconds(self) -> float:
        """Returns the time without a sign. Call in one thread every `LOOK` seconds; longer gaps count as `2 * LOOK`."""
        now = time.monotonic()
        signed, self._signed = self._signed, False
        self._seconds = 0.0 if signed else self._seconds + min(now - self._looked, 2 * LOOK)
        self._looked = now
        return self._seconds


def check_seconds(name: str, value: Any) -> None:
    """Checks that a value is a number of seconds above 0, or None.

    Raises:
        ValueError: the message names the argument.
    """
    if value is None:
        return
    if isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool) and 0 < float(value) < math.inf:
        return
    raise ValueError(f"{name}={value!r}: give a number of seconds above 0, or None for no bound")


def check_count(name: str, value: Any, least: int) -> None:
    """Checks that a value is a whole number of at least `least`.

    Raises:
        ValueError: the message names the argument.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")
