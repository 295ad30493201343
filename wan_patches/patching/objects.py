"""What one object does other than its class: behaviour given to it by another class, or methods of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any


def own_methods(instance: Any) -> set[str]:
    """Names of the methods that an object has in itself, in the place of its class's.

    Not what libraries leave behind that have wrapped a method and undone it: the class's own, bound to the object.
    """
    cls = type(instance)
    return {
        name
        for name, value in getattr(instance, "__dict__", {}).items()  # objects with slots have none
        if callable(value)
        and hasattr(cls, name)
        and not (  # by exact type: a proxy answers as what it stands for
            type(value) is MethodType and value.__self__ is instance and value.__func__ is getattr(cls, name)
        )
    }


def exchange_class(instance: Any, members: Mapping[str, Any]) -> Callable[[], None]:
    """Gives `instance` a subclass of its class with these members, under the same name.

    Classes are exchanged, not attributes set: this is around hooks and compiled code, and `deepcopy` keeps it right.

    Returns:
        A function that gives the class back, unless the object has been given yet another meanwhile.
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
    # not by `setattr`, which a compiled module hands on to the one inside
    object.__setattr__(instance, "__class__", cls)
