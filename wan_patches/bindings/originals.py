"""Whether the functions that stock would call are still the library's own.

A fast form passes over them. Whoever has replaced or wrapped one wants it called: patches ask at call time, and take
stock's way where the answer is no. They do not ask about functions that only make new tensors (`torch.zeros`): what
translates devices replaces those, and nothing is lost.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

from wan_patches.patching.objects import own_methods

_LIBRARIES = ("torch.", "diffusers.", "peft.", "PIL.")
_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType)


def is_librarys(function: Any) -> bool:
    """Whether a function is a library's own, with code from where it is defined; a patched one is.

    Libraries: torch, diffusers, PEFT and Pillow.
    """
    if type(function) is not types.FunctionType:
        return False
    module = function.__globals__
    is_there = function.__code__.co_filename == module.get("__file__")
    return is_there and module["__name__"].startswith(_LIBRARIES)


def is_librarys_throughout(function: Any) -> bool:
    """`is_librarys`, also of each function that a decorator has kept: in `__wrapped__` or in a closure."""
    while is_librarys(function):
        cells = map(_contents, function.__closure__ or ())
        if not all(is_librarys_throughout(value) for value in cells if callable(value) and not isinstance(value, type)):
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return False


def has_librarys(instance: Any, *names: str) -> bool:
    """Whether these methods of an object are the library's own, neither wrapped nor replaced, in object or class."""
    cls = type(instance)
    return (
        cls.__getattribute__ is object.__getattribute__
        and own_methods(instance).isdisjoint(names)
        and all(is_librarys_throughout(_function(cls, name)) for name in names)
    )


def are_torchs(*functions: Any) -> bool:
    """Whether functions of `torch` and `torch.nn.functional`, and methods of tensors, are torch's own: Python or C."""
    return all(
        type(function) in _IN_C or (is_librarys(function) and not hasattr(function, "__wrapped__"))
        for function in functions
    )


def is_watched() -> bool:
    """Whether a mode, a transform, a tracer or a compiler sees the operations; the mode of a default device is none."""
    import torch

    from wan_patches.ops.tracing import is_transformed

    return torch.compiler.is_compiling() or is_transformed()


def _function(cls: type, name: str) -> Any:
    method = inspect.getattr_static(cls, name, None)
    return method.__func__ if isinstance(method, (staticmethod, classmethod)) else method


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
