"""What works on one request at a time: a thread of this process, or the worker processes of a group of devices."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from wan_patches.executor.errors import WorkerDied
from wan_patches.executor.rank import failure_of
from wan_patches.executor.requests import Progress, Request
from wan_patches.executor.session import Interrupted, Session
from wan_patches.executor.transport import Channel, Packed

LOG_LINES = 40  # kept for WorkerDied
OTHER_RANKS = 30.0  # seconds that ranks have to end a request after one of them has failed
GOODBYE = 10.0  # seconds that a worker has to end after being told to

#: For the collectives of ranks, which are all on this machine: nothing of them on the network.
_LOOPBACK = {
    f"{library}_SOCKET_IFNAME": name
    for _, name in (socket.if_nameindex() if hasattr(socket, "if_nameindex") else ())
    if name in ("lo", "lo0")
    for library in ("GLOO", "NCCL")
}

Log = Callable[[int, str], None]


def _nothing() -> None:
    pass


class Group(Protocol):
    """One of these for each pipeline. One thread calls `start`, `run` and `stop`; `interrupt` and `kill` any."""

    remote: bool  # requests cross a process boundary
    on_death: Callable[[], None]  # called, by any thread, when workers have ended

    def start(self) -> None:
        """Builds the pipeline, again if need be; raises what keeps it from being built."""

    def run(self, request: Request) -> tuple[Any, dict[str, float]]:
        """The pipeline's result and seconds by stage; raises what it raised, `Interrupted` or `WorkerDied`."""

    def interrupt(self, request: int) -> None:
        """Asks for that request to be left at its next step."""

    def kill(self) -> None:
        """Ends the workers at once, to be started again; a thread cannot be ended, and goes on."""

    def alive(self) -> bool:
        """Whether `run` can be called without another `start`."""

    def stop(self) -> None:
        """Ends everything, in peace."""


class InlineGroup:
    """The pipeline lives in this process; nothing is copied."""

    remote = False

    def __init__(self, make_session: Callable[[], Session]) -> None:
        self._make_session = make_session
        self.on_death = _nothing
        self._session: Session | None = None

    def start(self) -> None:
        self._session = self._make_session()

    def run(self, request: Request) -> tuple[Any, dict[str, float]]:
        assert self._session is not None

        def report(step: int, total: int | None, bar: int) -> None:
            request._advance(Progress(step, total, bar))

        return self._session.run(request.id, request._arguments, request._keywords, report=report)

    def interrupt(self, request: int) -> None:
        if self._session is not None:
            self._session.interrupt(request)

    def kill(self) -> None:
        pass

    def alive(self) -> bool:
        return self._session is not None

    def stop(self) -> None:
        self._session = None


class WorkerGroup:
    """Worker processes, one for each device, that work on a request together."""

    remote = True

    def __init__(
        self,
        build: Packed,
        devices: Sequence[torch.device],
        *,
        first_rank: int,
        setup: dict[str, Any],
        environment: dict[str, str],
        log: Log,
    ) -> None:
        """`first_rank`: place of the first device in the executor's list. `setup`: see `worker.py`."""
        self._build, self._devices, self._first_rank = build, tuple(devices), first_rank
        self._setup, self._environment = setup, environment
        self._log = log
        self.on_death = _nothing
        self._workers: list[_Worker] = []
        self._events: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
        self._store: Any = None  # where the ranks find one another

    def start(self) -> None:
        self._clear()
        self._events = queue.Queue()
        rendezvous = None
        if len(self._devices) > 1:
            self._store = _store()
            rendezvous = self._store.port
        for rank, device in enumerate(self._devices):
            setup = self._setup | {"rank": rank, "ranks": len(self._devices), "rendezvous": rendezvous}
            worker = _Worker(self._first_rank + rank, device, self._events, self._environment, self._log, self.on_death)
            self._workers.append(worker)
            with contextlib.suppress(OSError):  # it has died already: the event tells how
                worker.channel.send("setup", info=setup, value=self._build)
        try:
            self._gather(None)
        except BaseException:
            self._clear()
            raise

    def run(self, request: Request) -> tuple[Any, dict[str, float]]:
        info = {"seed": request._seed, "patches": request._patches}
        for worker in self._workers:
            try:
                worker.channel.send("run", request.id, info, request._packed)
            except OSError:  # it died while it was idle, or reads no more; its event tells
                break
        message = self._gather(request)
        result = message.load()
        return result, message.info["timings"]

    def _gather(self, request: Request | None) -> Any:
        """Waits until every rank is done; the message of the first one."""
        done: dict[_Worker, Any] = {}
        deadline = None
        failure: BaseException | None = None
        while len(done) < len(self._workers):
            try:
                worker, message = self._events.get(timeout=deadline and max(0.0, deadline - time.monotonic()))
            except queue.Empty:  # one rank failed, the others wait for it in vain
                self._clear()
                break
            if worker not in self._workers:  # of workers that were ended before
                continue
            if message is None:
                if worker in done and done[worker].kind == "failed":
                    continue  # it could not load the pipeline, said so and left
                died = worker.died(None if request is None else request.id)
                self._clear()
                raise died  # the cause, too, of an exception that another rank met in torch.distributed
            if message.kind == "progress":
                if request is not None and message.request == request.id and worker is self._workers[0]:
                    request._advance(Progress(*message.info))
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

    def interrupt(self, request: int) -> None:
        for worker in list(self._workers):
            with contextlib.suppress(OSError):
                worker.channel.send("interrupt", request)

    def kill(self) -> None:
        for worker in list(self._workers):
            worker.kill()

    def _clear(self) -> None:
        self.kill()
        for worker in self._workers:
            worker.join()
        self._workers = []
        self._store = None

    def alive(self) -> bool:
        return bool(self._workers) and all(worker.alive() for worker in self._workers)

    def stop(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.channel.send("stop")
        deadline = time.monotonic() + GOODBYE
        for worker in self._workers:
            worker.wait(deadline - time.monotonic())
        self._clear()


def _store() -> Any:
    """What ranks find one another by; only processes of this machine can reach it."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))  # by itself, torch listens on all interfaces
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not on this system
        return None


class _Worker:
    """A worker process, and the threads that read its messages and its output."""

    def __init__(
        self,
        rank: int,
        device: torch.device,
        events: queue.Queue[tuple[_Worker, Any]],
        environment: dict[str, str],
        log: Log,
        on_death: Callable[[], None],
    ) -> None:
        self.rank = rank
        self._events, self._log, self._on_death = events, log, on_death
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.channel = Channel(self._socket, slots=0)  # inputs are small beside results, and need not stay mapped
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wan_patches.executor.worker", str(theirs.fileno()), str(device)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=_LOOPBACK | os.environ | environment,
            )
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()
        # the end of the stream alone does not tell of its death: what it forked may hold the other end open
        self._pidfd = _pidfd(self._process.pid)
        self._threads = [
            threading.Thread(target=self._read_messages, name=f"wan-patches worker {rank}", daemon=True),
            threading.Thread(target=self._read_output, name=f"wan-patches worker {rank} output", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def died(self, request: int | None) -> WorkerDied:
        """Call after the event that told of it."""
        self._threads[1].join(1.0)  # the last lines of output; something it started may still hold the pipe
        return WorkerDied(self._process.returncode, self.rank, request, tuple(self._lines))

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def join(self) -> None:
        """After `kill`: nothing of it is left."""
        self._process.wait()
        for thread in self._threads:
            thread.join(1.0)
        self.channel.close()
        if self._pidfd is not None:
            os.close(self._pidfd)

    def _read_messages(self) -> None:
        try:
            while self._wait_for_message():
                self._events.put((self, self.channel.recv()))
        except (EOFError, OSError):
            pass
        try:
            self._process.wait(GOODBYE)
        except subprocess.TimeoutExpired:  # it has closed its end, and lives
            self._process.kill()
            self._process.wait()
        self._events.put((self, None))
        self._on_death()

    def _wait_for_message(self) -> bool:
        """False once the process has ended and all that it sent is read."""
        if self._pidfd is None:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        return self._socket.fileno() in [fd for fd, _ in poll.poll()]

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for raw in output:
                # what a progress bar overwrote was not meant to stay
                line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
                self._lines.append(line)
                with contextlib.suppress(Exception):  # the pipe must be read on, or the worker stands still
                    self._log(self.rank, line)
