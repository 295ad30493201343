"""Whether the functions that stock would call are still the library's own.

A fast form passes over them. Whoever has replaced or wrapped one wants it called: patches ask at call time, and take
stock's way where the answer is no.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

_LIBRARIES = ("torch.", "diffusers.")


def is_librarys(function: Any) -> bool:
    """Whether a function is torch's or diffusers' own, with code from where it is defined; a patched one is."""
    if type(function) is not types.FunctionType:
        return False
    module = function.__globals__
    is_there = function.__code__.co_filename == module.get("__file__")
    return is_there and module["__name__"].startswith(_LIBRARIES)


def is_librarys_throughout(function: Any) -> bool:
    """`is_librarys`, also of each function that a decorator has kept: in `__wrapped__` or in a closure."""
    while is_librarys(function):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        if not all(is_librarys_throughout(value) for value in cells if callable(value) and not isinstance(value, type)):
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return False


def has_librarys(instance: Any, *names: str) -> bool:
    """Whether these methods of an object are the library's own, neither wrapped nor replaced, in object or class."""
    own = getattr(instance, "__dict__", {})
    return not any(name in own for name in names) and all(
        is_librarys_throughout(_function(type(instance), name)) for name in names
    )


def are_torchs(*functions: Any) -> bool:
    """Whether functions of `torch` and `torch.nn.functional` are torch's own, in Python or in C."""
    return all(
        type(function) is types.BuiltinFunctionType or (is_librarys(function) and not hasattr(function, "__wrapped__"))
        for function in functions
    )


def _function(cls: type, name: str) -> Any:
    method = inspect.getattr_static(cls, name, None)
    return method.__func__ if isinstance(method, (staticmethod, classmethod)) else method
