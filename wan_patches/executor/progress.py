"""Progress bars of running requests."""

from __future__ import annotations

import threading
from typing import Any

from wan_patches.executor.requests import Progress, Request


class Bars:
    """Displays a progress bar per running request in the terminal; serves as the executor's `on_progress`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._display: Any = None
        self._tasks: dict[Request, Any] = {}

    def __call__(self, request: Request, progress: Progress) -> None:
        with self._lock:
            if request.done():
                return
            if self._display is None:
                self._display = _display()
                self._display.start()
            if request not in self._tasks:
                self._tasks[request] = self._display.add_task(f"request {request.id}", total=progress.total)
                request.add_done_callback(self._finished)
            bar = f", {progress.bar}" if progress.bar > 1 else ""
            self._display.update(
                self._tasks[request],
                completed=progress.step,
                total=progress.total,
                description=f"request {request.id}{bar}",
            )

    def _finished(self, request: Any) -> None:
        with self._lock:
            task = self._tasks.pop(request, None)
            if task is not None:
                self._display.remove_task(task)
            if not self._tasks and self._display is not None:
                self._display.stop()
                self._display = None


def _display() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )
