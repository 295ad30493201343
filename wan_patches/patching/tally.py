"""Counts the calls that patched code makes, by their origin and by the form that served them.

`status()`, `profile()`, `verify()`, `bench compatibility` and the tests read these totals. Compiled code counts
nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

FIRST_SIGHT = "compared with the reference at first sight"


class Way(NamedTuple):
    """The common properties of calls that are counted together.

    module: the module whose code was rewritten; `entry`: the function it called, as `"module:function"`.
    op: the computation; one entry may call several.
    form: the form that served it; empty for stock's operations, and then `reason` gives the reason.
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

_packages = {"wan_patches"}  # packages whose stack frames are skipped


class _PassedOver(dict[str, bool]):
    """Whether stack frames of a module are skipped, by its name; cached, because every call asks."""

    def __missing__(self, module: str) -> bool:
        found = self[module] = module.partition(".")[0] in _packages
        return found


_is_passed_over = _PassedOver()
_frame = sys._getframe
#: The module that counts calls on behalf of ops.
DISPATCH = "wan_patches.ops.dispatch"
_counts: dict[tuple[str, str, str, str, str, str], list[int]] = {}  # lists of one number, incremented in place
_lock = threading.Lock()
_listeners: list[tuple[int, Listener]] = []

#: The location of each op as `"module:function"`, by name.
paths: dict[str, str] = {}


def count(op: str, form: str, reason: str = "") -> None:
    """Counts one call served by `form`, or by stock for `reason`; the caller is found outside of this package."""
    depth, owner, module = 1, "", _frame(1).f_globals.get("__name__", "")
    try:
        while _is_passed_over[module]:
            outer = _frame(depth + 1).f_globals.get("__name__", "")
            depth, owner, module = depth + 1, module, outer
    except ValueError:  # outermost frame
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
    """From now on, attributes calls from `package` to its callers, as for `wan_patches` itself."""
    _packages.add(package)
    _is_passed_over.clear()


def note(op: str, form: str, reason: str = "") -> None:
    """Calls `count`, but does nothing in code that a compiler is tracing."""
    import torch

    if not torch.compiler.is_compiling():
        count(op, form, reason)


def counted() -> dict[Way, int]:
    """Returns the number of calls so far for each `Way`."""
    with _lock:
        return {_way(key): calls for key, (calls,) in _counts.items()}


def total(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Sums counts, each a pair of fast calls and all calls."""
    fast, calls = zip(*counts, (0, 0))
    return sum(fast), sum(calls)


def reset() -> None:
    """Forgets all counts."""
    with _lock:
        _counts.clear()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` for every call counted in this thread during the block."""
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
