"""Checks that the functions which stock would call are still the library's own.

A fast form bypasses those functions, but a user who replaced or wrapped one expects it to be called. Bindings therefore
check at call time, and fall back to the stock implementation. Functions that only allocate new tensors (`torch.zeros`)
are not checked: device-translation libraries replace them, and bypassing those replacements changes nothing.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

from wan_patches.patching.objects import own_methods

_LIBRARIES = ("torch.", "diffusers.", "peft.", "PIL.")
_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType)


def is_library_function(function: Any) -> bool:
    """Whether a function is a library's own, with code from the file that defines it; patched functions qualify.

    Libraries: torch, diffusers, PEFT and Pillow.
    """
    if type(function) is not types.FunctionType:
        return False
    module = function.__globals__
    is_there = function.__code__.co_filename == module.get("__file__")
    return is_there and module["__name__"].startswith(_LIBRARIES)


def is_library_function_throughout(function: Any) -> bool:
    """Whether `is_library_function` holds for the function and for all functions its decorators keep.

    Decorators keep functions in `__wrapped__` or in a closure.
    """
    while is_library_function(function):
        cells = map(_contents, function.__closure__ or ())
        if not all(
            is_library_function_throughout(value) for value in cells if callable(value) and not isinstance(value, type)
        ):
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return False


def has_library_methods(instance: Any, *names: str) -> bool:
    """Whether these methods of an object are the library's own: not wrapped or replaced in the object or its class."""
    cls = type(instance)
    return (
        cls.__getattribute__ is object.__getattribute__
        and own_methods(instance).isdisjoint(names)
        and all(is_library_function_throughout(_function(cls, name)) for name in names)
    )


def are_torch_functions(*functions: Any) -> bool:
    """Whether functions of `torch` and `torch.nn.functional`, and tensor methods, are torch's own, in Python or C."""
    return all(
        type(function) in _IN_C or (is_library_function(function) and not hasattr(function, "__wrapped__"))
        for function in functions
    )


def is_watched() -> bool:
    """Whether a mode, transform, tracer or compiler sees the operations; the default-device mode does not count."""
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
