"""Which function a call of a module runs, and whether foreign code can run before it.

Bindings ask here before they call a module differently than stock does, or with different values.
"""

from __future__ import annotations

import functools
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from wan_patches.bindings.stock_functions import is_library_function
from wan_patches.patching.objects import own_methods

#: Hooks that only move or cast tensors without reading their values: modules, and the hook classes they define.
_MOVING = {
    "accelerate.hooks": ("AlignDevicesHook", "CpuOffload"),
    "diffusers.hooks.group_offloading": (
        "GroupOffloadingHook",
        "LazyPrefetchGroupOffloadingHook",
        "LayerExecutionTrackerHook",
    ),
    "diffusers.hooks.layerwise_casting": ("LayerwiseCastingHook",),
}


def forward_of(module: nn.Module) -> FunctionType | None:
    """Returns the library function that a call of `module` reaches with its arguments unchanged.

    None if foreign code may see the arguments first. Offloading hooks, layerwise-casting hooks and the library's own
    decorators do not count as foreign code.
    """
    if is_hooked(module) or not _calls_forward(type(module)):
        return None
    forward: Any = module.forward
    while type(forward) is functools.partial:
        forward = _behind_hook(module, forward)
    # exact types and identity, because proxies imitate the object they wrap
    is_method = type(forward) is MethodType and forward.__self__ is module
    function: Any = forward.__func__ if is_method else None
    of_class: Any = type(module).forward
    if function is not of_class:
        return None
    while is_library_function(function):
        if not hasattr(function, "__wrapped__"):
            return function  # type: ignore[no-any-return]
        function = function.__wrapped__
    return None


def runs_only_library_code(module: nn.Module) -> bool:
    """Whether no foreign code sees the inputs of `module` and its submodules.

    Hooks that only move or cast tensors are allowed.
    """
    return all(part._compiled_call_impl is None and forward_of(part) is not None for part in module.modules())


def runs(module: nn.Module, *names: str) -> bool:
    """Whether `forward_of(module)` is a function that refers to one of these names."""
    function = forward_of(module)
    return function is not None and not set(names).isdisjoint(function.__code__.co_names)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of `module` runs its class's forward as the library defines it, without hooks of any kind."""
    return not (
        is_hooked(module)
        or module._compiled_call_impl is not None
        or ("forward" in vars(module) and "forward" in own_methods(module))
        or not is_library_function(type(module).forward)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether torch runs a hook before or after the forward of `module`."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or has_global_hooks()


def has_global_hooks() -> bool:
    """Whether torch runs a hook before or after the forward of every module."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _calls_forward(cls: type[nn.Module]) -> bool:
    """Whether instances are called by torch's `__call__`, or by this package's own that watches or divides modules."""
    return (
        (cls.__call__ is nn.Module.__call__ or _is_from_this_package(cls.__call__))
        and cls._call_impl is nn.Module._call_impl
        and is_library_function(nn.Module.__call__)
        and is_library_function(nn.Module._call_impl)
    )


def _is_from_this_package(function: object) -> bool:
    return type(function) is FunctionType and function.__globals__["__name__"].startswith("wan_patches.")


def _behind_hook(module: nn.Module, forward: functools.partial[Any]) -> Any:
    """Returns the function that a library's forward wrapper calls, or None if its hook may read tensors."""
    function: Any = forward.func
    if type(function) is not FunctionType or not forward.args or forward.args[0] is not module:
        return None
    library = function.__globals__.get("__name__")
    if library == "accelerate.hooks":
        hook, behind = getattr(module, "_hf_hook", None), getattr(module, "_old_forward", None)
    elif library == "diffusers.hooks.hooks" and function.__code__.co_freevars == ("function_reference",):
        (reference,) = (cell.cell_contents for cell in function.__closure__ or ())
        hook, behind = getattr(reference.pre_forward, "__self__", None), reference.forward
    else:
        return None
    return behind if behind is not forward and _only_moves(hook) else None


def _only_moves(hook: Any) -> bool:
    cls = type(hook)
    if (cls.__module__, cls.__name__) == ("accelerate.hooks", "SequentialHook"):
        return all(map(_only_moves, hook.hooks))
    return cls.__name__ in _MOVING.get(cls.__module__, ())
