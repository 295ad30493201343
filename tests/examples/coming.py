"""What this branch waits for, until the executor has it: `health`, `queue_timeout`, `shutdown(timeout=)`."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from wan_patches import ParallelExecutor


@dataclass(frozen=True)
class WorkerHealth:
    rank: int
    device: str
    state: str
    since: float
    pid: int | None
    request: int | None
    restarts: int
    reason: str | None


@dataclass(frozen=True)
class Health:
    workers: tuple[WorkerHealth, ...]
    waiting: int
    running: int

    @property
    def serving(self) -> int:
        return sum(worker.state in ("idle", "running") for worker in self.workers)


class Executor(ParallelExecutor):
    pids: dict[int, set[int]]

    def submit(self, *arguments: Any, queue_timeout: float | None = None, **keywords: Any):
        return super().submit(*arguments, **keywords)

    def health(self) -> Health:
        self.pids = self.__dict__.get("pids", {})
        workers = []
        for rank, group in enumerate(self._crew.groups):
            alive = group.alive()
            processes = [worker._process.pid for worker in getattr(group, "_workers", ())]
            pid = processes[0] if processes else None
            if pid is not None:
                self.pids.setdefault(rank, set()).add(pid)
            running = self._crew._running.get(group)
            state = ("running" if running else "idle") if alive else "down"
            restarts = max(0, len(self.pids.get(rank, ())) - 1)
            workers.append(
                WorkerHealth(rank, "cpu", state, time.monotonic(), pid, running and running.id, restarts, None)
            )
        waiting = sum(not request.done() for request in self._crew._waiting)
        return Health(tuple(workers), waiting, len(self._crew._running))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        timer = None
        if timeout is not None:
            timer = threading.Timer(timeout, self._crew.cancel)
            timer.daemon = True
            timer.start()
        super().shutdown(wait, cancel_futures=cancel_futures)
        if timer is not None:
            timer.cancel()
