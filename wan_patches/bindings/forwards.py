"""What a call of a module runs, and whether anybody's code stands before it.

Patches ask here that call a module otherwise than stock does, or hand it another value.
"""

from __future__ import annotations

import functools
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from wan_patches.bindings.originals import is_librarys
from wan_patches.patching.objects import own_methods

#: Hooks that move and cast tensors, and look into none: modules, and classes that they define.
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
    """The library's function that a call of `module` comes to with its arguments as they are.

    None where others' code may look at them first. Hooks of offloading and of layerwise casting, and decorators that
    the library itself has put on its function, do not.
    """
    if is_hooked(module) or not _calls_forward(type(module)):
        return None
    forward: Any = module.forward
    while type(forward) is functools.partial:
        forward = _behind_hook(module, forward)
    # exact types and identity: proxies answer as what they stand for
    is_method = type(forward) is MethodType and forward.__self__ is module
    function: Any = forward.__func__ if is_method else None
    of_class: Any = type(module).forward
    if function is not of_class:
        return None
    while is_librarys(function):
        if not hasattr(function, "__wrapped__"):
            return function  # type: ignore[no-any-return]
        function = function.__wrapped__
    return None


def hands_on(module: nn.Module) -> bool:
    """Whether nobody's code sees what `module` and the modules in it are called with.

    Hooks that move and cast tensors are nobody's.
    """
    return all(part._compiled_call_impl is None and forward_of(part) is not None for part in module.modules())


def runs(module: nn.Module, *names: str) -> bool:
    """Whether `forward_of(module)` is a function that calls one of these names."""
    function = forward_of(module)
    return function is not None and not set(names).isdisjoint(function.__code__.co_names)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward as the library has it, without hooks of any kind."""
    return not (
        is_hooked(module)
        or module._compiled_call_impl is not None
        or ("forward" in vars(module) and "forward" in own_methods(module))
        or not is_librarys(type(module).forward)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether torch calls something before or after the forward of `module`."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or has_global_hooks()


def has_global_hooks() -> bool:
    """Whether torch calls something before or after the forward of every module."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _calls_forward(cls: type[nn.Module]) -> bool:
    """Whether objects of a class are called as torch calls modules, or as this package does to watch or divide them."""
    return (
        (cls.__call__ is nn.Module.__call__ or _is_ours(cls.__call__))
        and cls._call_impl is nn.Module._call_impl
        and is_librarys(nn.Module.__call__)
        and is_librarys(nn.Module._call_impl)
    )


def _is_ours(function: object) -> bool:
    return type(function) is FunctionType and function.__globals__["__name__"].startswith("wan_patches.")


def _behind_hook(module: nn.Module, forward: functools.partial[Any]) -> Any:
    """What is called by what a library has put in the place of a forward; None where its hook may look at tensors."""
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
