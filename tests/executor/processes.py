"""The workers of this process's executors, seen from outside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil

#: At the start of a script that is to be interrupted: shells have processes in the background ignore SIGINT.
HEEDS_CONTROL_C = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


def workers() -> list[psutil.Process]:
    """Those that live, in the order of their ranks."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            if any("wan_patches.executor.worker" in word for word in child.cmdline()):
                found.append(child)
    return sorted(found, key=lambda worker: worker.pid)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
