"""Ways to stand between a pipeline and its modules, and what is seen from there."""

from __future__ import annotations

import contextlib
import functools
import zlib

import torch

WAYS = ("hooks", "class", "objects")


def seen(value):
    """What somebody can tell of a value that is handed on: its type; of tensors, how they lie and all bits."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        flat = tensor.flatten().clone(memory_format=torch.contiguous_format)
        bits = zlib.crc32(flat.view(torch.uint8).numpy()) if tensor.numel() else 0
        return type(value).__name__, tuple(tensor.shape), tensor.stride(), tensor.dtype, bits
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [seen(item) for item in value]
    if isinstance(value, dict):
        return {key: seen(item) for key, item in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


@contextlib.contextmanager
def watching(modules, way):
    """The calls of `modules`, all of one class, in order: what went in and what came out."""
    calls = []
    with contextlib.ExitStack() as stack:
        if way == "hooks":
            for module in modules:

                def hook(module, args, kwargs, output):
                    calls.append(seen([args, kwargs, output]))

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        elif way == "class":
            cls = type(modules[0])
            stack.callback(setattr, cls, "forward", cls.forward)
            cls.forward = _recorded(cls.forward, calls, skip=1)
        else:
            for module in modules:
                stack.callback(delattr, module, "forward")
                module.forward = _recorded(module.forward, calls)
        yield calls


def _recorded(function, calls, skip=0):
    @functools.wraps(function)
    def call(*args, **kwargs):
        before = seen([args[skip:], kwargs])
        result = function(*args, **kwargs)
        calls.append([before, seen(result)])
        return result

    return call


def modules_of(pipe):
    """The modules of the transformers and of the autoencoder, by class."""
    found = {}
    for part in ("transformer", "transformer_2", "vae"):
        model = getattr(pipe, part, None)
        for module in model.modules() if isinstance(model, torch.nn.Module) else ():
            found.setdefault(type(module), []).append(module)
    return {cls: modules for cls, modules in found.items() if "forward" in vars(cls)}
