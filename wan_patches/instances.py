"""Other behaviour for one object, by another class for it: nothing is wrapped, and its holders notice nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


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
