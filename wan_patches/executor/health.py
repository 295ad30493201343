"""What an executor says about itself: its workers and its queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["loading", "idle", "running", "down"]


@dataclass(frozen=True)
class WorkerHealth:
    """One worker at one moment.

    Attributes:
        rank: its place in the executor's list of devices.
        device: such as "cuda:0".
        state: "loading" its pipeline, "idle", "running" a request, or "down": waiting to be started again.
        since: seconds that it has been so.
        pid: of its process, None if there is none.
        request: number of the request that it runs.
        restarts: how often it was started again.
        reason: why it went down last, None if it never did since it last finished a request.
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
    """An executor at one moment.

    Attributes:
        workers: in the order of their ranks. Workers that work on a request together are in the same state.
        waiting: requests that wait for a worker.
        running: requests that run.
    """

    workers: tuple[WorkerHealth, ...]
    waiting: int
    running: int

    @property
    def serving(self) -> int:
        """How many workers are idle or running."""
        return sum(worker.state in ("idle", "running") for worker in self.workers)
