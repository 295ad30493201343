"""Watches calls of chosen functions from outside: they are not touched, and nothing is paid when nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any


@dataclass
class CallTrace:
    """How the watching went. displaced: another profiler was set meanwhile, and what ran under it was not seen."""

    displaced: bool = False


@contextlib.contextmanager
def tracing_calls(
    codes: Collection[CodeType] | Callable[[FrameType], bool],
    *,
    on_call: Callable[[FrameType], None] | None = None,
    on_return: Callable[[FrameType, Any], None] | None = None,
) -> Iterator[CallTrace]:
    """Has each call of a function that runs one of `codes` told, in this thread and for the block.

    Code that a compiler has taken over does not run as Python and is not seen. There is one profiler at a time: one
    that was set before (`sys.setprofile`, cProfile) rests meanwhile. One that cannot be put back afterwards (of C code)
    is left where it is, and one that is set within the block stays: what runs under either is not seen, which the
    trace says.

    Args:
        codes: code objects, by identity: a function's own (`__code__`) and the one it had before it was patched
            are different. Or a function that is asked once about each, with the first frame that runs it.
        on_call: called with the frame, in which the arguments are its `f_locals`.
        on_return: called with the frame and what it returns; None also where an exception leaves it.

    Yields:
        An `CallTrace`, which is complete after the block.
    """
    trace = CallTrace()
    is_wanted = codes if callable(codes) else lambda frame: False
    alive = [] if callable(codes) else list(codes)  # so that no other code object gets the id of one
    wanted = {id(code): True for code in alive}
    inside = False

    def profiler(frame: FrameType, event: str, value: Any) -> None:
        nonlocal inside
        if event == "c_call" and value is sys.setprofile:  # it may put this one back, as those who nest do
            trace.displaced = True
        if inside or event not in ("call", "return"):
            return
        known = wanted.get(id(frame.f_code))
        if known is None:
            alive.append(frame.f_code)
            known = wanted[id(frame.f_code)] = is_wanted(frame)
        if not known:
            return
        inside = True  # what the callbacks call is not told
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
        trace.displaced = displaced  # putting back looks like displacing
        alive.clear()


def _pause(profiler: Any) -> Callable[[], None] | None:
    """Has `profiler` rest, and gives what ends that; None, and it goes on, where nothing would."""
    if profiler is None or callable(profiler):
        return lambda: sys.setprofile(profiler)
    if hasattr(profiler, "disable") and hasattr(profiler, "enable"):  # cProfile's; from Python 3.12 on it is not here
        profiler.disable()
        return profiler.enable  # type: ignore[no-any-return]
    return None
