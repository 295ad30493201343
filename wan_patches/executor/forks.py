"""Handles shared memory, sockets and threads when this process forks.

A forked child inherits everything, and the parent never learns for how long the child keeps it. Before a fork, every
object registered here therefore gives up memory that it would reuse; in the child, it drops the resources that only the
parent can use. No step takes a lock: another thread may hold it for long, and in the child forever. Code that releases
memory checks `under_way` first.

Forks by C code that does not call Python's hooks are not detected. A subprocess is not a fork: it runs another program.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """An object with fork hooks. The hooks must not raise or wait for a thread."""

    def before_fork(self) -> None:
        """Called before a fork, and again in the parent afterwards, to cover what other threads did meanwhile."""

    def after_fork_in_child(self) -> None:
        """Called in the child, where only the current thread exists."""


_watched: weakref.WeakValueDictionary[int, Forkable] = weakref.WeakValueDictionary()
_under_way: list[None] = []  # one entry per fork; threads may fork concurrently


def watch(thing: Forkable) -> None:
    """Calls the hooks of `thing` for every fork during its lifetime."""
    _watched[id(thing)] = thing


def under_way() -> bool:
    """Whether a child may exist for which `before_fork` has not run yet."""
    return bool(_under_way)


def _living() -> list[Forkable]:
    return [thing for reference in _watched.valuerefs() if (thing := reference()) is not None]


def _before() -> None:
    _under_way.append(None)
    for thing in _living():
        thing.before_fork()


def _after_in_parent() -> None:
    try:
        for thing in _living():
            thing.before_fork()
    finally:
        del _under_way[-1:]


def _after_in_child() -> None:
    _under_way.clear()
    for thing in _living():
        thing.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
