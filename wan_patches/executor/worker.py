"""The worker process, which runs `main`.

A worker reads messages from its parent's socket: first `setup`, then requests, one at a time. A spare process receives
`import` before that. A worker runs only its pipeline, and exits when the socket is closed or its parent exits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import queue
import select
import signal
import socket
import sys
import threading
import time

import torch

from wan_patches.executor import main_module
from wan_patches.executor.layouts import device_named
from wan_patches.executor.rank import Rank, failed
from wan_patches.executor.session import Interrupted
from wan_patches.executor.transport import Channel, Message, pack
from wan_patches.pipelines.streaming import Chunk

#: Packages that spare processes import in advance, as far as a worker has imported them. Excludes the user's packages,
#: whose import may have side effects.
_SLOW_TO_IMPORT = frozenset({"torch", "diffusers", "transformers", "accelerate", "peft", "wan_patches"})
_IDLE = 30.0  # seconds without a request after which memory of results is freed


class Worker:
    """Loads a pipeline and runs requests from the messages of `channel`."""

    def __init__(self, channel: Channel, setup: Message) -> None:
        self._channel, self._setup = channel, setup
        channel.device = device = device_named(setup.info["device"])
        self._rank = Rank(setup.info["rank"], setup.info["ranks"], device)
        self._inbox: queue.Queue[Message] = queue.Queue()

    def run(self) -> None:
        """Serves requests until the parent sends "stop"."""
        threading.Thread(target=self._read, name="messages", daemon=True).start()
        if self._setup.info["beat"] is not None:
            self._channel.send("up")
            threading.Thread(target=self._beat, name="signs of life", daemon=True).start()
        try:
            self._load()
        except BaseException as error:
            self._channel.send("failed", 0, *failed(error))
            return
        self._channel.send("ready", info={"modules": _slow_to_import()})
        while (message := self._next()).kind != "stop":
            self._serve(message)
            del message  # frees the inputs, which may be in the parent's memory
        self._rank.close()

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.recv()
                if message.kind == "interrupt":
                    self._rank.interrupt(message.request)
                else:
                    self._inbox.put(message)
                del message
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone, so the running request is not needed

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the parent is gone
            while True:
                self._channel.send("alive")
                time.sleep(self._setup.info["beat"])

    def _next(self) -> Message:
        while True:
            try:
                return self._inbox.get(timeout=_IDLE)
            except queue.Empty:
                self._channel.trim()

    def _load(self) -> None:
        info = self._setup.info
        if info["main"]:
            main_module.load(info["main"])
        store = None
        if info["ranks"] > 1:
            store = torch.distributed.FileStore(info["rendezvous"], info["ranks"])
        self._rank.load(self._setup.load, info["patches"], store)

    def _serve(self, message: Message) -> None:
        def report(step: int, total: int | None, bar: int) -> None:
            self._channel.send("progress", message.request, (step, total, bar))

        def on_frames(chunk: Chunk) -> None:
            self._channel.send("frames", message.request, (chunk.start, chunk.reason), pack(chunk.frames))

        try:
            result, timings = self._rank.run(
                message.request,
                message.load,
                seed=message.info["seed"],
                patches=message.info["patches"],
                empty_strided=self._channel.empty_strided,
                report=report,
                on_frames=on_frames if message.info["streams"] else None,
            )
        except Interrupted:
            self._channel.send("interrupted", message.request)
        except BaseException as error:
            self._channel.send("failed", message.request, *failed(error))
        else:
            self._channel.send("done", message.request, {"timings": timings}, result)


def _slow_to_import() -> list[str]:
    """Returns the modules that spare processes should import, in the order of their import here."""
    return [name for name in list(sys.modules) if name.partition(".")[0] in _SLOW_TO_IMPORT]


def _import(names: list[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(BaseException):  # the pipeline will raise the error if it needs the module
                importlib.import_module(name)


def _end_with(parent: int) -> None:
    """Exits this process when the process `parent` ends.

    The socket does not signal that reliably: a process forked from the parent may hold the other end open.
    """
    try:
        descriptor = os.pidfd_open(parent)
    except (AttributeError, OSError):  # not available on this system, or the parent has already ended
        while os.getppid() == parent:
            time.sleep(1.0)
    else:
        if os.getppid() == parent:  # otherwise, the pid may belong to another process by now
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
    os._exit(1)


def main(fd: int, parent: int) -> None:
    """Serves messages from the socket `fd` until "stop" or until the process `parent` ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which handles it
    faulthandler.enable(all_threads=False)
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    channel = Channel(socket.socket(fileno=fd))
    try:
        while (message := channel.recv()).kind == "import":
            _import(message.info)
            channel.send("imported")
    except (EOFError, OSError):
        return
    Worker(channel, message).run()
