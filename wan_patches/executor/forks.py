"""What happens to shared memory, sockets and threads when this process forks.

A forked child has all that its parent has, and the parent never learns for how long. So before a fork every object
registered here parts with memory that would be used again, and in the child gives up what only the parent can use.
No step takes a lock, which a thread may hold for long, and in the child for ever. Whatever gives memory back asks
`under_way` first.

Forks by C code that does not call Python's hooks are not seen. A subprocess is no fork: it starts another program.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Neither method may raise, or wait for a thread."""

    def before_fork(self) -> None:
        """Called before a fork, and after it in the parent for what other threads have done meanwhile."""

    def after_fork_in_child(self) -> None:
        """Called in the child, in which no thread but the current one goes on."""


_watched: weakref.WeakValueDictionary[int, Forkable] = weakref.WeakValueDictionary()
_under_way: list[None] = []  # one for each fork; threads may fork at once


def watch(thing: Forkable) -> None:
    """Tells `thing` of forks for as long as it lives."""
    _watched[id(thing)] = thing


def under_way() -> bool:
    """Whether there may be a child that `before_fork` has not prepared for."""
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
