"""Starts worker processes, and keeps spare processes with the imports of a worker already done."""

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

ENDS_WITHIN = 10.0  # seconds for the system to end a killed process

#: Keeps collectives off the network: all ranks are on this machine.
_LOOPBACK = {
    f"{library}_SOCKET_IFNAME": name
    for _, name in (socket.if_nameindex() if hasattr(socket, "if_nameindex") else ())
    if name in ("lo", "lo0")
    for library in ("GLOO", "NCCL")
}

#: A worker first adopts its parent's module search path, since Python would search the current directory first. Only
#: built-in modules are imported before that.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from wan_patches.executor.worker import main; main({fd}, {parent})"


class Process:
    """A worker process and this end of its channel."""

    def __init__(self, path: Sequence[str], environment: Mapping[str, str], send_timeout: float | None) -> None:
        """`path`: module search path. `environment`: additions to `os.environ`. `send_timeout`: see `Channel`."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # inputs are small compared to results and need not stay mapped
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
        # end of stream does not signal its death reliably: a process forked from it may hold the socket open
        self.pidfd = _pidfd(self.popen.pid)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_for_message(self, timeout: float | None = None) -> bool:
        """Waits for a message. Returns False after the end of the process and its last message, or on timeout."""
        if self.pidfd is None and timeout is None:
            return True  # `recv` reports the end
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        if self.pidfd is not None:
            poll.register(self.pidfd, select.POLLIN)
        found = poll.poll(None if timeout is None else timeout * 1000)
        return self.socket.fileno() in [fd for fd, _ in found]

    def end(self) -> None:
        """Kills the process and waits for its end, with a limit: a process blocked on a file server ends only later."""
        self.popen.kill()
        try:
            self.popen.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            logger.warning("process %d has not ended %g s after SIGKILL; not waiting any longer", self.pid, ENDS_WITHIN)

    def close(self) -> None:
        """Closes the channel. Call after the end of the process, when no thread waits for a message."""
        self.channel.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


class Launcher:
    """Provides processes for workers: spare ones, which only need to load the pipeline, or new ones."""

    def __init__(
        self, path: Sequence[str], environment: Mapping[str, str], *, spares: int, send_timeout: float | None
    ) -> None:
        """`spares`: number of spare processes; other arguments as for `Process`."""
        self._start = lambda: Process(path, environment, send_timeout)
        self._count = spares
        self._lock = threading.Lock()
        self._spares: list[Process] = []
        self._closed = False

    def take(self) -> Process:
        """Returns a process that waits for its setup."""
        with self._lock:
            for spare in self._spares:
                # a message means that its imports are done; otherwise it would not be faster than a new one
                if spare.popen.poll() is None and spare.wait_for_message(0):
                    self._spares.remove(spare)
                    return spare
        return self._start()

    def prepare(self, modules: Sequence[str]) -> None:
        """Starts the missing spare processes, which import these modules."""
        with self._lock:
            for spare in [spare for spare in self._spares if spare.popen.poll() is not None]:
                self._spares.remove(spare)
                _discard(spare)
            while not self._closed and len(self._spares) < self._count:
                try:
                    spare = self._start()
                except OSError as error:  # the ready worker can serve without a spare
                    logger.warning("no spare process could be started: %s", error)
                    return
                self._spares.append(spare)
                with contextlib.suppress(OSError):  # it is dead already
                    spare.channel.send("import", info=list(modules))

    def close(self) -> None:
        """Ends the spare processes."""
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
    """Returns the flags of this interpreter, such as -O and -W."""
    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not on this system
        return None
