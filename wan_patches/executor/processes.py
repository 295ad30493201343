"""Starts the processes of workers, and keeps spare ones that have imported what workers import."""

from __future__ import annotations

import contextlib
import multiprocessing.spawn
import os
import select
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence

from wan_patches.executor.requests import logger
from wan_patches.executor.transport import Channel

ENDS_WITHIN = 10.0  # seconds that the system may take to end a process that was killed

#: For the collectives of ranks, which are all on this machine: nothing of them on the network.
_LOOPBACK = {
    f"{library}_SOCKET_IFNAME": name
    for _, name in (socket.if_nameindex() if hasattr(socket, "if_nameindex") else ())
    if name in ("lo", "lo0")
    for library in ("GLOO", "NCCL")
}

#: The first thing that a worker does is to look for modules where its parent does, and nowhere else: Python itself
#: would look in the current directory first. Only built-in modules are imported before.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from wan_patches.executor.worker import main; main({fd}, {parent})"


class Process:
    """A worker's process, and this end of the channel to it."""

    def __init__(self, path: Sequence[str], environment: Mapping[str, str], send_timeout: float | None) -> None:
        """`path`: of modules. `environment`: what differs from this process's. `send_timeout`: see `Channel`."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # inputs are small beside results, and need not stay mapped
        self.channel = Channel(self.socket, slots=0, send_timeout=send_timeout)
        program = _PROGRAM.format(path=list(path), fd=theirs.fileno(), parent=os.getpid())
        try:
            self.popen = subprocess.Popen(
                [os.fsdecode(multiprocessing.spawn.get_executable()), *_flags(), "-u", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env={**_LOOPBACK, **os.environ, **environment},
            )
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()
        # the end of the stream alone does not tell of its death: what it forked may hold the other end open
        self.pidfd = _pidfd(self.popen.pid)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_for_message(self, timeout: float | None = None) -> bool:
        """False once the process has ended and all that it sent is read, or nothing came in `timeout` seconds."""
        if self.pidfd is None and timeout is None:
            return True  # `recv` tells
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        if self.pidfd is not None:
            poll.register(self.pidfd, select.POLLIN)
        found = poll.poll(None if timeout is None else timeout * 1000)
        return self.socket.fileno() in [fd for fd, _ in found]

    def end(self) -> None:
        """Kills it and waits for its end, but not for ever: one that waits for a file server ends when that answers."""
        self.popen.kill()
        try:
            self.popen.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            logger.warning("process %d was killed and has not ended after %g s; it is left", self.pid, ENDS_WITHIN)

    def close(self) -> None:
        """After its end, when nobody waits for a message any more."""
        self.channel.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


class Launcher:
    """Gives processes for workers: spare ones, which only need the pipeline, or new ones."""

    def __init__(
        self, path: Sequence[str], environment: Mapping[str, str], *, spares: int, send_timeout: float | None
    ) -> None:
        """`spares`: how many wait for a worker to end; the rest as for `Process`."""
        self._start = lambda: Process(path, environment, send_timeout)
        self._count = spares
        self._lock = threading.Lock()
        self._spares: list[Process] = []
        self._closed = False

    def take(self) -> Process:
        """A process that waits for its setup."""
        with self._lock:
            for spare in self._spares:
                # what it has sent is that it is done; one that still imports would be no sooner than a new one
                if spare.popen.poll() is None and spare.wait_for_message(0):
                    self._spares.remove(spare)
                    return spare
        return self._start()

    def prepare(self, modules: Sequence[str]) -> None:
        """Has spare processes for the next workers, which import these modules."""
        with self._lock:
            for spare in [spare for spare in self._spares if spare.popen.poll() is not None]:
                self._spares.remove(spare)
                _discard(spare)
            while not self._closed and len(self._spares) < self._count:
                try:
                    spare = self._start()
                except OSError as error:  # the worker that is ready serves without one
                    logger.warning("no spare process could be started: %s", error)
                    return
                self._spares.append(spare)
                with contextlib.suppress(OSError):  # it has died already
                    spare.channel.send("import", info=list(modules))

    def close(self) -> None:
        """Ends the spares."""
        with self._lock:
            self._closed = True
            spares, self._spares = self._spares, []
        for spare in spares:
            spare.popen.kill()
        for spare in spares:
            _discard(spare)


def _discard(spare: Process) -> None:
    spare.end()
    assert spare.popen.stdout is not None
    spare.popen.stdout.close()
    spare.close()


def _flags() -> list[str]:
    """This interpreter's, such as -O and -W."""
    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not on this system
        return None
