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
        request: number of the request that is lost, None if there was none: it loaded the pipeline, or waited.
        log: the worker's last lines of output, None if they are not at hand.
        pid: of the process, None if it is not known.
        node: address of the machine, None if it is this one.
        doing: what the worker was doing, in words.
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
        """Which one it was, in words."""
        return worker_named(self.rank, self.pid, self.node)

    @property
    def summary(self) -> str:
        """What happened, without the worker's output."""
        return f"{self.worker} {_ended(self.exit_code)} {self.doing}"

    def __str__(self) -> str:
        if self.log is None:
            return self.summary
        lines = "".join(f"\n    {line}" for line in self.log)
        return f"{self.summary}; its last output:{lines}" if lines else f"{self.summary}; it had written nothing"


class WorkerHung(WorkerDied):
    """The process that worked on a request gave no sign for longer than the executor's bound, and was ended.

    Attributes:
        bound: which of `Bounds` it exceeded.
        seconds: that bound.
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
    """An exception of a worker whose own type could not be brought over; the message names it."""


class ExecutorBroken(BrokenExecutor):
    """No worker has served for longer than the executor's bound `outage`; the cause is what the last one failed of."""


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


def worker_named(rank: int, pid: int | None, node: str | None = None) -> str:
    """A worker in words."""
    where = [text for text in (f"pid {pid}" if pid else "", f"node {node}" if node else "") if text]
    return f"worker {rank} ({', '.join(where)})" if where else f"worker {rank}"


def portable(error: BaseException) -> BaseException:
    """`error` if it survives pickling with its type and message, else a `RemoteError` that tells both."""
    import pickle

    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except BaseException:  # anything can go wrong in someone's __reduce__
        pass
    return RemoteError(f"{type(error).__module__}.{type(error).__qualname__}: {_message(error)}")


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as problem:
        return f"(its message cannot be printed: {type(problem).__name__})"
