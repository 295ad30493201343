"""What a future of the executor can end with, beside what the pipeline itself raises."""

from __future__ import annotations

import signal
from concurrent.futures import BrokenExecutor
from typing import Any


class WorkerDied(RuntimeError):
    """The process that worked on a request ended before its result was there.

    Attributes:
        exit_code: of the process; negative: the signal that ended it; None if it could not be learned.
        rank: the worker's place in the executor's list of devices.
        request: number of the request that is lost, None if it died while it loaded the pipeline.
        log: the worker's last lines of output, None if they are not at hand.
    """

    def __init__(
        self, exit_code: int | None, rank: int, request: int | None, log: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(exit_code, rank, request, log)
        self.exit_code, self.rank, self.request, self.log = exit_code, rank, request, log

    def __str__(self) -> str:
        doing = "while it loaded the pipeline" if self.request is None else f"during request {self.request}"
        told = f"worker {self.rank} {_ended(self.exit_code)} {doing}"
        if self.log is None:
            return told
        lines = "".join(f"\n    {line}" for line in self.log)
        return f"{told}; its last output:{lines}" if lines else f"{told}; it had written nothing"


class RemoteError(RuntimeError):
    """An exception of a worker whose own type could not be brought over; the message names it."""


class ExecutorBroken(BrokenExecutor):
    """No worker is left, and none could be started again; the cause is the last attempt's exception."""


class RemoteTraceback(Exception):
    """The cause of an exception that came from a worker: where it was raised there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text.rstrip()}"


def with_traceback(error: BaseException, text: str) -> BaseException:
    """`error`, with the traceback that it had in the worker as its cause."""
    error.__cause__ = RemoteTraceback(text)
    return error


def _ended(exit_code: int | None) -> str:
    if exit_code is None:
        return "ended"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def portable(error: BaseException) -> Any:
    """`error` if it survives pickling with its type and message, else a `RemoteError` that tells both."""
    import pickle

    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # anything can go wrong in someone's __reduce__
        pass
    return RemoteError(f"{type(error).__module__}.{type(error).__qualname__}: {error}")
