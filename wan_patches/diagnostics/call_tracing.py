"""Traces calls of selected functions without changing them; costs nothing while no trace is active."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any


@dataclass
class CallTrace:
    """The outcome of a trace. displaced: another profiler was set meanwhile; calls under it are missing."""

    displaced: bool = False


@contextlib.contextmanager
def tracing_calls(
    codes: Collection[CodeType] | Callable[[FrameType], bool],
    *,
    on_call: Callable[[FrameType], None] | None = None,
    on_return: Callable[[FrameType, Any], None] | None = None,
) -> Iterator[CallTrace]:
    """Reports the calls of functions that run one of `codes`, in this thread, during the block.

    Code compiled by torch.compile does not run as Python and is not seen. Python supports one profiler at a time: a
    profiler that was set before (`sys.setprofile`, cProfile) is paused during the block. A profiler in C that cannot be
    restored afterwards is left in place, and one that is set within the block stays; the trace misses calls under
    either, and reports that as `displaced`.

    Args:
        codes: code objects, compared by identity: a function's current `__code__` and the one it had before patching
            are different. Or a predicate, called once for each code object with the first frame that runs it.
        on_call: called with the frame; its `f_locals` are the arguments.
        on_return: called with the frame and the return value, or None if an exception leaves the function.

    Yields:
        A `CallTrace`, complete after the block.
    """
    trace = CallTrace()
    is_wanted = codes if callable(codes) else lambda frame: False
    alive = [] if callable(codes) else list(codes)  # keeps the ids unique
    wanted = {id(code): True for code in alive}
    inside = False

    def profiler(frame: FrameType, event: str, value: Any) -> None:
        nonlocal inside
        if event == "c_call" and value is sys.setprofile:  # a nested profiler may restore this one later
            trace.displaced = True
        if inside or event not in ("call", "return"):
            return
        known = wanted.get(id(frame.f_code))
        if known is None:
            alive.append(frame.f_code)
            known = wanted[id(frame.f_code)] = is_wanted(frame)
        if not known:
            return
        inside = True  # calls made by the callbacks are not reported
        try:
            if event == "call" and on_call is not None:
                on_call(frame)
            elif event == "return" and on_return is not None:
                on_return(frame, value)
        finally:
            inside = False

    put_back = _pause(sys.getprofile())
    if put_back is None:
        trace.displaced = True
        yield trace
        return
    sys.setprofile(profiler)
    try:
        yield trace
    finally:
        displaced = trace.displaced
        if sys.getprofile() is profiler:
            put_back()
        else:
            displaced = True
        trace.displaced = displaced  # `put_back` itself sets the flag
        alive.clear()


def _pause(profiler: Any) -> Callable[[], None] | None:
    """Pauses `profiler` and returns the function that resumes it, or None if it cannot be resumed; it then stays on."""
    if profiler is None or callable(profiler):
        return lambda: sys.setprofile(profiler)
    if hasattr(profiler, "disable") and hasattr(profiler, "enable"):  # cProfile; not seen from Python 3.12 on
        profiler.disable()
        return profiler.enable  # type: ignore[no-any-return]
    return None
