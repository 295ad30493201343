"""Behaviour of a single object that differs from its class: an exchanged class, or methods of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any


def own_methods(instance: Any) -> set[str]:
    """Returns the names of methods that the object's own attributes override.

    Excludes what libraries leave behind after they wrap a method and undo it: the class's own method, bound to the
    object.
    """
    cls = type(instance)
    return {
        name
        for name, value in getattr(instance, "__dict__", {}).items()  # objects with slots have none
        if callable(value)
        and hasattr(cls, name)
        and not (  # by exact type, because a proxy imitates the object it wraps
            type(value) is MethodType and value.__self__ is instance and value.__func__ is getattr(cls, name)
        )
    }


def exchange_class(instance: Any, members: Mapping[str, Any]) -> Callable[[], None]:
    """Gives `instance` a subclass of its class with these members, under the same name.

    The class is exchanged rather than attributes set, because this takes effect around hooks and compiled code, and
    survives `deepcopy`.

    Returns:
        A function that restores the class, unless the object has been given yet another one.
    """
    cls: Any = type(instance)
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, **members}
    subclass = type(cls)(cls.__name__, (cls,), body)
    _set_class(instance, subclass)

    def give_back() -> None:
        if type(instance) is subclass:
            _set_class(instance, cls)

    return give_back


def _set_class(instance: Any, cls: type) -> None:
    # not `setattr`, which a compiled module forwards to the module inside
    object.__setattr__(instance, "__class__", cls)
