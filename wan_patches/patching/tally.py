"""Which way calls took: every call of what patched code calls is counted, by where it came from and what ran.

`status()`, `profile()`, `verify()`, `bench compatibility` and the tests read these totals. Code that a compiler has
taken over counts nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

FIRST_SIGHT = "compared with the reference at first sight"


class Way(NamedTuple):
    """What calls have in common that were counted together.

    module: where the code is that was rewritten; `entry`: what it called there, as `"module:function"`.
    op: what was computed; one entry may call several.
    form: what computed it; empty for stock's operations, and then `reason` says why.
    """

    module: str
    entry: str
    op: str
    form: str
    reason: str = ""

    @property
    def is_fast(self) -> bool:
        return bool(self.form)


Listener = Callable[[Way], None]

_packages = {"wan_patches"}  # whose frames are passed over


class _PassedOver(dict[str, bool]):
    """Whether frames of a module are passed over, by its name: found out once, since every call asks."""

    def __missing__(self, module: str) -> bool:
        found = self[module] = module.partition(".")[0] in _packages
        return found


_is_passed_over = _PassedOver()
_frame = sys._getframe
#: The module whose calls are those of ops.
DISPATCH = "wan_patches.ops.dispatch"
_counts: dict[tuple[str, str, str, str, str, str], list[int]] = {}  # one number each, which is counted up in place
_lock = threading.Lock()
_listeners: list[tuple[int, Listener]] = []

#: Where ops are, as `"module:function"`, by their names.
paths: dict[str, str] = {}


def count(op: str, form: str, reason: str = "") -> None:
    """Counts one call, which takes `form`, or for `reason` stock's way. It came from outside of this package."""
    depth, owner, module = 1, "", _frame(1).f_globals.get("__name__", "")
    try:
        while _is_passed_over[module]:
            outer = _frame(depth + 1).f_globals.get("__name__", "")
            depth, owner, module = depth + 1, module, outer
    except ValueError:  # there is nobody further out
        pass
    function = _frame(depth - 1).f_code.co_name if owner else ""
    key = (module, owner, function, op, form, reason)
    with _lock:
        try:
            _counts[key][0] += 1
        except KeyError:
            _counts[key] = [1]
    if _listeners:
        _tell(key)


def pass_over(package: str) -> None:
    """From now on calls from this package are counted for whoever called it, as those from this one are."""
    _packages.add(package)
    _is_passed_over.clear()


def note(op: str, form: str, reason: str = "") -> None:
    """`count` for code that compilers may trace, where it does nothing."""
    import torch

    if not torch.compiler.is_compiling():
        count(op, form, reason)


def counted() -> dict[Way, int]:
    """All calls so far, by the way that they took."""
    with _lock:
        return {_way(key): calls for key, (calls,) in _counts.items()}


def total(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Of several counts, each of fast calls and of all: the sums."""
    fast, calls = zip(*counts, (0, 0))
    return sum(fast), sum(calls)


def reset() -> None:
    """Forgets all calls."""
    with _lock:
        _counts.clear()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Has every call of this thread told as it is counted, for the block."""
    item = (threading.get_ident(), listener)
    _listeners.append(item)
    try:
        yield
    finally:
        _listeners.remove(item)


def _tell(key: tuple[str, str, str, str, str, str]) -> None:
    for thread, listener in list(_listeners):
        if thread == threading.get_ident():
            listener(_way(key))


def _way(key: tuple[str, str, str, str, str, str]) -> Way:
    module, owner, function, op, form, reason = key
    return Way(module, paths[op] if owner == DISPATCH else f"{owner}:{function}", op, form, reason)
