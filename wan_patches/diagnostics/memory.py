"""Measures peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from wan_patches.pipelines.stages import synchronize

if TYPE_CHECKING:
    import torch

#: Returns the peak in bytes since its last call, or since the start; None if the backend does not count memory.
Peak = Callable[[], "int | None"]


@contextlib.contextmanager
def watching_memory(device: torch.device) -> Iterator[Peak]:
    """Yields a function that returns the peak memory since its last call, in bytes beyond the memory held at the start.

    On accelerators the numbers come from torch's allocator, whose peak counter is reset. On the CPU they come from the
    resident set of the process, which includes numpy and Pillow; its resolution is a few hundred KiB.
    """
    gc.collect()
    if device.type != "cpu":
        yield _allocated(device)
        return
    _return_free_memory()
    with _resident() as peak:
        yield peak


def _allocated(device: torch.device) -> Peak:
    import torch

    backend: Any = getattr(torch, device.type)
    if not hasattr(backend, "max_memory_allocated"):
        return lambda: None
    synchronize(device)
    backend.reset_peak_memory_stats()
    before = backend.memory_allocated()

    def peak() -> int:
        synchronize(device)
        most = backend.max_memory_allocated()
        backend.reset_peak_memory_stats()
        return max(0, most - before)

    return peak


def _return_free_memory() -> None:
    """Returns free heap memory to the system; otherwise its reuse would hide new allocations."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _resident() -> Iterator[Peak]:
    try:
        _reset_high_water()
        before = _proc_status("VmRSS")
    except (OSError, KeyError):
        with _sampled() as sampled:
            yield sampled
        return

    def peak() -> int:
        most = _proc_status("VmHWM")
        _reset_high_water()
        return max(0, most - before)

    yield peak


def _reset_high_water() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, Linux's high-water mark


def _proc_status(field: str) -> int:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[field].split()[0]) * 1024


@contextlib.contextmanager
def _sampled() -> Iterator[Peak]:
    try:
        import psutil
    except ImportError:
        yield lambda: None
        return
    process, done = psutil.Process(os.getpid()), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, process.memory_info().rss)

    def peak() -> int:
        nonlocal most
        now = process.memory_info().rss
        found, most = max(most, now), now
        return max(0, found - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
