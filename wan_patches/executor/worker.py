"""`python -m wan_patches.executor.worker FD DEVICE`: a worker process.

Reads from the socket FD, its parent's: first a `setup` message, then requests, one at a time. Runs nothing but the
pipeline it is given, and ends when the socket does.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import socket
import sys
import threading

import torch

from wan_patches.executor import main_module
from wan_patches.executor.layouts import device_named
from wan_patches.executor.rank import Rank, failed
from wan_patches.executor.session import Interrupted
from wan_patches.executor.transport import Channel, Message

_IDLE = 30.0  # seconds without a request after which memory that results used is given back


class Worker:
    """Does what the messages of `channel` say."""

    def __init__(self, channel: Channel, device: torch.device, setup: Message) -> None:
        self._channel, self._setup = channel, setup
        self._rank = Rank(setup.info["rank"], setup.info["ranks"], device)
        self._inbox: queue.Queue[Message] = queue.Queue()

    def run(self) -> None:
        """Until the parent says so."""
        threading.Thread(target=self._read, name="messages", daemon=True).start()
        try:
            self._load()
        except BaseException as error:
            self._channel.send("failed", 0, *failed(error))
            return
        self._channel.send("ready")
        while (message := self._next()).kind != "stop":
            self._serve(message)
            del message  # with it the inputs, which may lie in the parent's memory
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
            os._exit(1)  # the parent is gone: nobody waits for what runs

    def _next(self) -> Message:
        while True:
            try:
                return self._inbox.get(timeout=_IDLE)
            except queue.Empty:
                self._channel.trim()

    def _load(self) -> None:
        info = self._setup.info
        sys.path[:] = info["path"]
        if info["main"]:
            main_module.load(info["main"])
        store = None
        if info["ranks"] > 1:
            store = torch.distributed.TCPStore("127.0.0.1", info["rendezvous"])
        self._rank.load(self._setup.load, info["layout"], info["patches"], store)

    def _serve(self, message: Message) -> None:
        def report(step: int, total: int | None, bar: int) -> None:
            self._channel.send("progress", message.request, (step, total, bar))

        try:
            result, timings = self._rank.run(
                message.request,
                message.load,
                seed=message.info["seed"],
                patches=message.info["patches"],
                empty_strided=self._channel.empty_strided,
                report=report,
            )
        except Interrupted:
            self._channel.send("interrupted", message.request)
        except BaseException as error:
            self._channel.send("failed", message.request, *failed(error))
        else:
            self._channel.send("done", message.request, {"timings": timings}, result)


def main(fd: int, device_name: str) -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it decides
    faulthandler.enable(all_threads=False)
    device = device_named(device_name)
    channel = Channel(socket.socket(fileno=fd), device=device)
    try:
        setup = channel.recv()
    except EOFError:
        return
    Worker(channel, device, setup).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
