"""Watches calls of chosen functions from outside: they are not touched, and nothing is paid when nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from types import CodeType, FrameType
from typing import Any


@contextlib.contextmanager
def observing(
    codes: Collection[CodeType] | Callable[[FrameType], bool],
    *,
    on_call: Callable[[FrameType], None] | None = None,
    on_return: Callable[[FrameType, Any], None] | None = None,
) -> Iterator[None]:
    """Has each call of a function that runs one of `codes` told, in this thread and for the block.

    Code that a compiler has taken over does not run as Python and is not seen. A profiler that was set before
    (`sys.setprofile`) rests meanwhile.

    Args:
        codes: code objects, by identity: a function's own (`__code__`) and the one it had before it was patched
            are different. Or a function that is asked once about each, with the first frame that runs it.
        on_call: called with the frame, in which the arguments are its `f_locals`.
        on_return: called with the frame and what it returns; None also where an exception leaves it.
    """
    is_wanted = codes if callable(codes) else lambda frame: False
    alive = [] if callable(codes) else list(codes)  # so that no other code object gets the id of one
    wanted = {id(code): True for code in alive}
    inside = False

    def profiler(frame: FrameType, event: str, value: Any) -> None:
        nonlocal inside
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

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        yield
    finally:
        sys.setprofile(before)
        alive.clear()
