"""Exceptions that futures of the executor raise, apart from those of the pipeline."""

from __future__ import annotations

import signal
from concurrent.futures import BrokenExecutor
from typing import Any


class WorkerDied(RuntimeError):
    """A worker process ended before its request was finished.

    Attributes:
        exit_code: exit code of the process; negative for the signal that ended it; None if unknown.
        rank: index of the worker in the executor's list of devices.
        request: number of the lost request; None if the worker was loading its pipeline or idle.
        log: last lines of the worker's output; None if not available.
        pid: process id; None if unknown.
        node: address of the machine; None for this one.
        doing: description of what the worker was doing.
    """

    def __init__(
        self,
        exit_code: int | None,
        rank: int,
        request: int | None,
        log: tuple[str, ...] | None = None,
        pid: int | None = None,
        node: str | None = None,
        doing: str = "",
    ) -> None:
        doing = doing or ("while it loaded the pipeline" if request is None else f"during request {request}")
        super().__init__(exit_code, rank, request, log, pid, node, doing)
        self.exit_code, self.rank, self.request, self.log = exit_code, rank, request, log
        self.pid, self.node, self.doing = pid, node, doing

    @property
    def worker(self) -> str:
        """A description of the worker."""
        return worker_named(self.rank, self.pid, self.node)

    @property
    def summary(self) -> str:
        """The message without the worker's output."""
        return f"{self.worker} {_ended(self.exit_code)} {self.doing}"

    def __str__(self) -> str:
        if self.log is None:
            return self.summary
        lines = "".join(f"\n    {line}" for line in self.log)
        return f"{self.summary}; its last output:{lines}" if lines else f"{self.summary}; it had written nothing"


class WorkerHung(WorkerDied):
    """A worker process exceeded a limit of the executor and was ended.

    Attributes:
        bound: name of the exceeded limit in `Bounds`.
        seconds: value of that limit.
    """

    def __init__(self, bound: str, seconds: float, *of_death: Any) -> None:
        super().__init__(*of_death)
        self.args = (bound, seconds, *self.args)
        self.bound, self.seconds = bound, seconds

    @property
    def summary(self) -> str:
        missed = {
            "answer": "gave no sign of life",
            "load": "was not ready",
            "first_step": "did not reach the first step",
            "step": "made no step",
        }[self.bound]
        return f"{self.worker} {missed} for {self.seconds:g} s {self.doing}, and was ended"


class RemoteError(RuntimeError):
    """Stands for a worker's exception that cannot be pickled; the message includes the original type."""


class ExecutorBroken(BrokenExecutor):
    """No worker has served for longer than the `outage` limit; the cause is the last worker's failure."""


class RemoteTraceback(Exception):
    """The cause of an exception from a worker; contains the worker's traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text.rstrip()}"


def with_traceback(error: BaseException, text: str) -> BaseException:
    """Sets the worker's traceback as the cause of `error` and returns `error`."""
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
    hint = " (sent by the system when memory runs out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def worker_named(rank: int, pid: int | None, node: str | None = None) -> str:
    """Returns a description of a worker."""
    where = [text for text in (f"pid {pid}" if pid else "", f"node {node}" if node else "") if text]
    return f"worker {rank} ({', '.join(where)})" if where else f"worker {rank}"


def portable(error: BaseException) -> BaseException:
    """Returns `error` if pickling preserves its type and message, or else a `RemoteError` with both."""
    import pickle

    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except BaseException:  # a user-defined __reduce__ can raise anything
        pass
    return RemoteError(f"{type(error).__module__}.{type(error).__qualname__}: {_message(error)}")


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as problem:
        return f"(its message cannot be printed: {type(problem).__name__})"
