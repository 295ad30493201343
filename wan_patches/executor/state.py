"""What belongs to the whole process, and must be after a request what it was before."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

#: Those that programs set; looking at all 64 takes longer than a small request.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGCHLD")
    if hasattr(signal, name)
]


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Puts back what a pipeline has changed, or the next request would find it.

    That is: the current directory, the environment, signal handlers (in the main thread), and torch's default dtype,
    grad mode, number of threads and deterministic algorithms. Modules, and what they keep, are the pipeline's.
    """
    directory, environment, handlers = _directory(), dict(os.environ), _handlers()
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        if directory is not None and _directory() != directory:
            with contextlib.suppress(OSError):  # it is gone
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
    except OSError:  # it is gone
        return None


def _handlers() -> dict[int, Any]:
    """Those that Python can put back."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    return {number: handler for number, handler in found.items() if handler is not None}
