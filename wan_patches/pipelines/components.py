"""Reads the properties of a pipeline: its modules, denoisers, transformer blocks, device, hooks and compilation.

All functions are read-only. They accept diffusers pipelines and objects that look like them; modules may be wrapped by
torch.compile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = [
    "block_lists",
    "components",
    "denoisers",
    "distinct_modules",
    "execution_device",
    "has_accelerate_hooks",
    "has_device_map",
    "has_hook",
    "hook_registries",
    "is_compiled",
    "is_denoiser",
    "is_managed",
    "is_quantized",
    "is_quantized_by_bitsandbytes",
    "modules",
    "tensors",
    "without_compiler",
]

#: Name prefixes of the components that are denoisers (`transformer`, `transformer_2`, `unet`).
DENOISERS = ("transformer", "unet")


# Components


def components(pipe: Any) -> Mapping[str, Any]:
    """Returns the components of a pipeline by name; empty for any other object."""
    found = getattr(pipe, "components", None)
    return found if isinstance(found, Mapping) else {}


def modules(pipe: Any) -> dict[str, nn.Module]:
    """Returns the components that are modules, compiled ones in torch.compile's wrapper, as the pipeline calls them."""
    return {name: part for name, part in components(pipe).items() if isinstance(part, nn.Module)}


def distinct_modules(pipe: Any) -> dict[str, nn.Module]:
    """Returns the modules that hold the weights, without torch.compile's wrapper: each once, under its first name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in modules(pipe).items():
        part = without_compiler(part)
        found.setdefault(id(part), (name, part))
    return dict(found.values())


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Returns the models that the denoising loop calls, by component name, in torch.compile's wrapper if compiled.

    The component name decides, so models of any class are included.
    """
    return {name: module for name, module in modules(pipe).items() if is_denoiser(name)}


def is_denoiser(name: str) -> bool:
    """Whether a component with this name is a denoiser."""
    return name.startswith(DENOISERS)


def block_lists(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Returns the transformer blocks of a model: one dictionary per module list, from path in the model to block.

    Blocks are the items of the model's module lists whose classes the model names in `_repeated_blocks` or, without
    that, in `_no_split_modules`. If the lists contain no such items, all their items are blocks. Blocks nested in other
    blocks and lists without blocks are left out.
    """
    names = {*(getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ())}
    lists = [
        {f"{path}.{nth}": block for nth, block in enumerate(part)}
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList)
    ]
    named = [{path: block for path, block in part.items() if type(block).__name__ in names} for part in lists]
    chosen = named if any(named) else lists
    every = [block for blocks in chosen for block in blocks.values()]
    inner = {id(part) for block in every for part in block.modules() if part is not block}
    outermost = ({path: block for path, block in blocks.items() if id(block) not in inner} for blocks in chosen)
    return [blocks for blocks in outermost if blocks]


def tensors(*modules: nn.Module) -> list[torch.Tensor]:
    """Returns the parameters and buffers of the modules, each once."""
    found = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return list({id(tensor): tensor for tensor in found}.values())


def execution_device(pipe: Any) -> torch.device:
    """Returns the device on which a pipeline computes; if the pipeline is offloaded, its weights are elsewhere.

    Returns the CPU for an object that names no device.
    """
    for name in ("_execution_device", "device"):  # the first is right for offloaded pipelines
        with contextlib.suppress(Exception):
            return torch.device(getattr(pipe, name))
    return torch.device("cpu")


# Compiled


def without_compiler(module: Any) -> Any:
    """Returns the module inside torch.compile's wrapper, or the module itself if there is no wrapper."""
    return getattr(module, "_orig_mod", module)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs the module or any of its submodules."""
    parts = module.modules()
    return any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts)


# Quantised


def is_quantized(module: nn.Module) -> bool:
    """Whether diffusers has quantised the model's weights, with any library."""
    return bool(getattr(module, "is_quantized", False)) or getattr(module, "hf_quantizer", None) is not None


def is_quantized_by_bitsandbytes(module: nn.Module) -> bool:
    """Whether bitsandbytes has quantised the weights to 4 or 8 bits; such a model may refuse to be moved."""
    return any(getattr(module, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


# Hooks and offloading


def hook_registries(module: nn.Module) -> Iterator[Any]:
    """Yields diffusers' hook registries (`HookRegistry`) of a module and its submodules."""
    for part in module.modules():
        if (registry := getattr(part, "_diffusers_hook", None)) is not None:
            yield registry


def has_hook(module: nn.Module, name: str) -> bool:
    """Whether the module or a submodule has diffusers' hook of this name (such as "group_offloading")."""
    return any(registry.get_hook(name) is not None for registry in hook_registries(module))


def has_device_map(pipe: Any) -> bool:
    """Whether the pipeline was loaded with a device map."""
    return bool(getattr(pipe, "hf_device_map", None))


def has_accelerate_hooks(pipe: Any) -> bool:
    """Whether accelerate moves the weights, as in model offload and sequential offload."""
    return bool(getattr(pipe, "_all_hooks", None)) or any(hasattr(part, "_hf_hook") for part in modules(pipe).values())


def is_managed(pipe: Any) -> bool:
    """Whether a device map or any kind of offloading decides where the weights are."""
    if has_device_map(pipe) or has_accelerate_hooks(pipe):
        return True
    return any(has_hook(module, "group_offloading") for module in modules(pipe).values())
