"""Groups, which run one request at a time: in this process, or in one worker process per device."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from wan_patches.executor.bounds import LOOK, Bounds, Stillness
from wan_patches.executor.errors import WorkerDied, WorkerHung, worker_named
from wan_patches.executor.processes import Launcher, Process
from wan_patches.executor.rank import failure_of
from wan_patches.executor.requests import Progress, Request
from wan_patches.executor.session import Interrupted, Session
from wan_patches.executor.transport import Packed
from wan_patches.pipelines.streaming import Chunk

LOG_LINES = 40  # lines of output kept for WorkerDied
_LONGEST_LINE = 8 << 10  # bytes; longer lines are split, since a worker may never end a line
BEAT = 5.0  # maximum seconds between heartbeats
OTHER_RANKS = 30.0  # seconds for other ranks to end a request after one rank has failed
GOODBYE = 10.0  # grace period in seconds for a worker to exit

Log = Callable[[int, str], None]


def _nothing() -> None:
    pass


class Unwanted(Exception):
    """Loading was cancelled: the pipeline is no longer needed."""


class Group(Protocol):
    """Runs one pipeline. `interrupt`, `kill` and `members` are thread-safe; one thread calls the other methods."""

    remote: bool  # requests cross a process boundary
    name: str  # for messages
    on_death: Callable[[], None]  # called by any thread after a worker has ended

    def start(self, wanted: Callable[[], bool]) -> None:
        """Builds or rebuilds the pipeline. Raises the error that prevents it, or `Unwanted` if `wanted` turns false."""

    def run(self, request: Request) -> tuple[Any, dict[str, float]]:
        """Returns the result and seconds per stage. Raises the pipeline's exception, `Interrupted` or `WorkerDied`."""

    def interrupt(self, request: int) -> None:
        """Stops that request at its next step."""

    def kill(self) -> None:
        """Kills the workers; `start` starts them again. Has no effect on a thread, which cannot be killed."""

    def check(self) -> None:
        """Raises `WorkerDied` if `run` requires another `start`. Call every `LOOK` seconds."""

    def members(self) -> list[tuple[int, str, int | None]]:
        """Returns rank, device and process id of each worker."""

    def stop(self) -> None:
        """Shuts the workers down gracefully."""


class Progression:
    """Checks the progress of a load, or of a request, against the time limits."""

    def __init__(self, bounds: Bounds, loading: bool) -> None:
        self._bounds = bounds
        self._bound = "load" if loading else "first_step"
        self._still = Stillness()

    def step(self) -> None:
        """Records a step."""
        self._bound = "step"
        self._still.sign()

    def exceeded(self) -> tuple[str, float] | None:
        """Returns name and seconds of the exceeded limit, or None. Call every `LOOK` seconds."""
        bound = getattr(self._bounds, self._bound)
        return (self._bound, bound) if self._still.seconds() > (bound or float("inf")) else None


class Member(Protocol):
    """A process of a group, as seen by the executor."""

    rank: int
    silent: Stillness

    @property
    def up(self) -> bool:
        """Whether the process sends heartbeats."""

    def known(self, request: int | None, doing: str = "") -> tuple[Any, ...]:
        """Returns the arguments of `WorkerDied` for this process."""


def find_hung(
    members: Sequence[Member],
    bounds: Bounds,
    exceeded: tuple[str, float] | None,
    request: int | None,
    doing: str,
) -> WorkerHung | None:
    """Returns an error if a process of a group sends no heartbeats or the group has exceeded a limit, or None.

    Call every `LOOK` seconds.
    """
    late = members[0]
    for member in members:
        silent = member.silent.seconds()
        if member.up and bounds.answer is not None and silent > bounds.answer:
            late, exceeded = member, ("answer", bounds.answer)
    return None if exceeded is None else WorkerHung(*exceeded, *late.known(request, doing))


class InlineGroup:
    """Runs the pipeline in this process, without copies."""

    remote = False
    name = "the pipeline"

    def __init__(self, make_session: Callable[[], Session], device: torch.device) -> None:
        self._make_session, self._device = make_session, device
        self.on_death = _nothing
        self._session: Session | None = None

    def start(self, wanted: Callable[[], bool]) -> None:
        self._session = self._make_session()

    def run(self, request: Request) -> tuple[Any, dict[str, float]]:
        assert self._session is not None

        def report(step: int, total: int | None, bar: int) -> None:
            request._advance(Progress(step, total, bar))

        def on_frames(chunk: Chunk) -> None:
            request._hand_over(lambda: chunk.frames, chunk.start, chunk.reason)

        return self._session.run(
            request.id,
            request._arguments,
            request._keywords,
            report=report,
            on_frames=on_frames if request._streams else None,
        )

    def interrupt(self, request: int) -> None:
        if self._session is not None:
            self._session.interrupt(request)

    def kill(self) -> None:
        pass

    def check(self) -> None:
        pass

    def members(self) -> list[tuple[int, str, int | None]]:
        return [(0, str(self._device), os.getpid())]

    def stop(self) -> None:
        self._session = None


class WorkerGroup:
    """Runs the pipeline in worker processes, one per device, that work on a request together."""

    remote = True

    def __init__(
        self,
        build: Packed,
        devices: Sequence[torch.device],
        *,
        first_rank: int,
        setup: dict[str, Any],
        launcher: Launcher,
        bounds: Bounds,
        log: Log,
    ) -> None:
        """`first_rank`: index of the first device in the executor's list. `setup`: see `worker.py`."""
        self._build, self._devices, self._first_rank = build, tuple(devices), first_rank
        self._setup, self._launcher, self._bounds = setup, launcher, bounds
        self._log = log
        self.name = group_name(first_rank, len(self._devices))
        self.on_death = _nothing
        self._workers: list[_Worker] = []
        self._events: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
        self._rendezvous: _Rendezvous | None = None

    def start(self, wanted: Callable[[], bool]) -> None:
        self._clear()
        self._events = queue.Queue()
        if len(self._devices) > 1:
            self._rendezvous = _Rendezvous()
        for rank, device in enumerate(self._devices):
            setup = self._setup | {
                "device": str(device),
                "rank": rank,
                "ranks": len(self._devices),
                "rendezvous": self._rendezvous and self._rendezvous.path,
                "beat": self._bounds.answer and min(BEAT, self._bounds.answer / 4),
            }
            process = self._launcher.take()
            worker = _Worker(process, self._first_rank + rank, device, self._events, self._log, self.on_death)
            self._workers.append(worker)
            with contextlib.suppress(OSError):  # it is dead already; its last event reports how
                process.channel.send("setup", info=setup, value=self._build)
        try:
            message = self._gather(None, wanted)
        except BaseException:
            self._clear()
            raise
        self._launcher.prepare(message.info["modules"])

    def run(self, request: Request) -> tuple[Any, dict[str, float]]:
        info = {"seed": request._seed, "patches": request._patches, "streams": request._streams}
        for worker in self._workers:
            try:
                worker.process.channel.send("run", request.id, info, request._packed)
            except OSError:  # it died while idle or stopped reading; its last event reports that
                break
        message = self._gather(request)
        result = message.load()
        return result, message.info["timings"]

    def _gather(self, request: Request | None, wanted: Callable[[], bool] = lambda: True) -> Any:
        """Waits until every rank is done, and returns the last message of the first rank."""
        done: dict[_Worker, Any] = {}
        deadline = None
        failure: BaseException | None = None
        progression = Progression(self._bounds, loading=request is None)
        while len(done) < len(self._workers):
            try:
                worker, message = self._events.get(timeout=LOOK)
            except queue.Empty:
                if not wanted():
                    raise Unwanted from None
                if deadline is not None and time.monotonic() > deadline:
                    self._clear()  # one rank failed, and the others would wait for it forever
                    break
                self._look(None if request is None else request.id, progression.exceeded())
                continue
            if worker not in self._workers:  # from a worker of an earlier start
                continue
            if message is None:
                if worker in done and done[worker].kind == "failed":
                    continue  # it reported that loading failed, and exited
                died = worker.died(None if request is None else request.id)
                self._clear()
                raise died  # also the cause of errors of torch.distributed in other ranks
            if message.kind == "progress":
                progression.step()
                if request is not None and message.request == request.id and worker is self._workers[0]:
                    request._advance(Progress(*message.info))
                continue
            if message.kind == "frames":
                progression.step()
                if request is not None and message.request == request.id:
                    request._hand_over(message.load, *message.info)
                del message  # frees unused frames before the next wait
                continue
            if message.request != (0 if request is None else request.id):
                continue
            done[worker] = message
            if message.kind in ("failed", "interrupted") and failure is None:
                failure = Interrupted() if message.kind == "interrupted" else failure_of(message)
                deadline = time.monotonic() + OTHER_RANKS
        if failure is not None:
            raise failure
        return done[self._workers[0]]

    def _look(self, request: int | None, exceeded: tuple[str, float] | None, doing: str = "") -> None:
        """Raises `WorkerHung` if a worker sends no heartbeats or the group has exceeded a limit."""
        hung = find_hung(self._workers, self._bounds, exceeded, request, doing)
        if hung is not None:
            self._clear()
            raise hung

    def interrupt(self, request: int) -> None:
        for worker in list(self._workers):
            with contextlib.suppress(OSError):
                worker.process.channel.send("interrupt", request)

    def kill(self) -> None:
        for worker in list(self._workers):
            worker.kill()

    def _clear(self) -> None:
        self.kill()
        for worker in self._workers:
            worker.join()
        self._workers = []
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None

    def check(self) -> None:
        if not self._workers:
            raise WorkerDied(None, self._first_rank, None, None, None, None, "as another of its group had failed")
        dead = [worker for worker in self._workers if worker.process.popen.poll() is not None]
        if dead:
            raise dead[0].died(None, "while it was idle")
        self._look(None, None, "while it was idle")

    def members(self) -> list[tuple[int, str, int | None]]:
        pids: dict[int, int] = {worker.rank: worker.process.pid for worker in list(self._workers)}
        ranks = enumerate(self._devices, self._first_rank)
        return [(rank, str(device), pids.get(rank)) for rank, device in ranks]

    def stop(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.process.channel.send("stop")
        deadline = time.monotonic() + GOODBYE
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.popen.wait(max(0.0, deadline - time.monotonic()))
        self._clear()
        self._launcher.close()


def group_name(first_rank: int, ranks: int) -> str:
    """Returns the name of a group for messages."""
    return worker_named(first_rank, None) if ranks == 1 else f"workers {first_rank} to {first_rank + ranks - 1}"


class _Rendezvous:
    """A file through which the ranks of a group find one another. Only processes of this user can open it."""

    def __init__(self) -> None:
        try:
            self._descriptor = os.memfd_create("wan-patches rendezvous")
            self.path, self._folder = f"/proc/{os.getpid()}/fd/{self._descriptor}", None
        except AttributeError:  # not available on this system
            self._folder = tempfile.mkdtemp(prefix="wan-patches-")
            self.path = os.path.join(self._folder, "rendezvous")

    def close(self) -> None:
        if self._folder is None:
            os.close(self._descriptor)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Worker:
    """A worker process, and the threads that read its messages and output."""

    def __init__(
        self,
        process: Process,
        rank: int,
        device: torch.device,
        events: queue.Queue[tuple[_Worker, Any]],
        log: Log,
        on_death: Callable[[], None],
    ) -> None:
        self.process, self.rank = process, rank
        self.up = False  # it has announced heartbeats
        self.silent = Stillness()
        self._events, self._log, self._on_death = events, log, on_death
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._threads = [
            threading.Thread(target=self._read_messages, name=f"wan-patches worker {rank}", daemon=True),
            threading.Thread(target=self._read_output, name=f"wan-patches worker {rank} output", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def died(self, request: int | None, doing: str = "") -> WorkerDied:
        """Returns the error for the end of the process. Call after its last event."""
        self._threads[1].join(1.0)  # for the last lines of output; with a limit, as a subprocess may hold the pipe open
        return WorkerDied(*self.known(request, doing))

    def known(self, request: int | None, doing: str = "") -> tuple[Any, ...]:
        popen = self.process.popen
        return popen.returncode, self.rank, request, tuple(self._lines), popen.pid, None, doing

    def kill(self) -> None:
        self.process.popen.kill()

    def join(self) -> None:
        """Ends the process if it is running, and releases its resources."""
        self.process.end()
        for thread in self._threads:
            thread.join(1.0)
        if not self._threads[0].is_alive():
            self.process.close()

    def _read_messages(self) -> None:
        process = self.process
        try:
            while process.wait_for_message():
                message = process.channel.recv()
                self.silent.sign()
                if message.kind == "up":
                    self.up = True
                elif message.kind not in ("alive", "imported"):
                    self._events.put((self, message))
                del message
        except (EOFError, OSError):
            pass
        try:
            process.popen.wait(GOODBYE)
        except subprocess.TimeoutExpired:  # it has closed its end of the channel but is still running
            process.end()
        self._events.put((self, None))
        self._on_death()

    def _read_output(self) -> None:
        assert self.process.popen.stdout is not None
        with self.process.popen.stdout as output:
            while raw := output.readline(_LONGEST_LINE):
                # drops text that a progress bar has overwritten
                line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
                self._lines.append(line)
                with contextlib.suppress(Exception):  # without further reads, the worker would block on the full pipe
                    self._log(self.rank, line)
