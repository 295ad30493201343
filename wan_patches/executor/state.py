"""Restores process-wide state after a request."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

#: The signals that programs commonly handle; checking all 64 takes longer than a small request.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGCHLD")
    if hasattr(signal, name)
]


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Restores process-wide state that a pipeline has changed, so that it does not affect the next request.

    Covers the current directory, the environment, signal handlers (in the main thread), and torch's default dtype, grad
    mode, number of threads and deterministic mode. Does not cover modules and their state.
    """
    directory, environment, handlers = _directory(), dict(os.environ), _handlers()
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        if directory is not None and _directory() != directory:
            with contextlib.suppress(OSError):  # the directory was deleted
                os.chdir(directory)
        if os.environ != environment:
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_deterministic_debug_mode() != deterministic:
            torch.set_deterministic_debug_mode(deterministic)


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # the directory was deleted
        return None


def _handlers() -> dict[int, Any]:
    """Returns the signal handlers that Python can restore."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    return {number: handler for number, handler in found.items() if handler is not None}
