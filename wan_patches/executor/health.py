"""Health reports of an executor: its workers and its queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["loading", "idle", "running", "down"]


@dataclass(frozen=True)
class WorkerHealth:
    """A snapshot of one worker.

    Attributes:
        rank: index of the worker in the executor's list of devices.
        device: such as "cuda:0".
        state: "loading" the pipeline, "idle", "running" a request, or "down": waiting for a restart.
        since: seconds spent in this state.
        pid: process id; None if there is no process.
        request: number of the running request.
        restarts: number of restarts.
        reason: cause of the last failure; None if there was none since the last finished request.
    """

    rank: int
    device: str
    state: State
    since: float
    pid: int | None = None
    request: int | None = None
    restarts: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class Health:
    """A snapshot of an executor.

    Attributes:
        workers: all workers in the order of their ranks. Workers of the same group share their state.
        waiting: number of requests waiting for a worker.
        running: number of running requests.
    """

    workers: tuple[WorkerHealth, ...]
    waiting: int
    running: int

    @property
    def serving(self) -> int:
        """The number of workers that are idle or running."""
        return sum(worker.state in ("idle", "running") for worker in self.workers)
