"""What several layouts need: devices, the parts of a pipeline, the size of the group, and moving."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def device_named(name: str | torch.device) -> torch.device:
    """Returns the device of that name. For an NPU this imports torch_npu, which teaches torch the word."""
    if str(name).startswith("npu"):
        import torch_npu  # noqa: F401
    return torch.device(name)


def make_current(device: torch.device) -> torch.device:
    """Makes the device the current one, as meshes and FSDP take for granted, and returns it with its index."""
    if device.type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(device)
    if device.index is None:
        device = torch.device(device.type, module.current_device())
    module.set_device(device)
    torch.empty(0, device=device)  # a mesh sets the device itself where it finds none initialised
    return device


def ranks_in_group(layout: str, wanted: str = "2 or more", most: int | None = None) -> int:
    """Returns the number of ranks of this process's group.

    Args:
        layout, wanted: for the message: the layout, and the number of ranks that it needs, in words.
        most: the largest number of ranks that will do.

    Raises:
        ValueError: there is a single rank, or there are more than `most`.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world < 2 or (most is not None and world > most):
        raise ValueError(f"layout {layout!r} needs {wanted} devices in a group, not {world}")
    return world


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """Returns the pipeline's components that are modules, by name; none of what is no pipeline."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        return {}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def denoisers_of(pipe: Any, layout: str) -> list[nn.Module]:
    """Returns the pipeline's transformers or UNets.

    Raises:
        ValueError: there are none; the message names the layout and what there is.
    """
    modules = modules_of(pipe)
    found = [module for name, module in modules.items() if name.startswith(("transformer", "unet"))]
    if not found:
        raise ValueError(
            f"layout {layout!r} needs a diffusers pipeline with a `transformer` or a `unet`; {type(pipe).__name__} has "
            + (", ".join(modules) or "no components")
        )
    return found


def has_hook(module: nn.Module, name: str) -> bool:
    """Tells whether diffusers' hook of that name is on the module or in it."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(registry is not None and registry.get_hook(name) is not None for registry in registries)


def is_managed(pipe: Any) -> bool:
    """Tells whether offloading or a device map decides where the pipeline's modules are."""
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        return True
    modules = modules_of(pipe).values()
    return any(hasattr(module, "_hf_hook") or has_hook(module, "group_offloading") for module in modules)


def is_packed(module: nn.Module) -> bool:
    """Tells whether bitsandbytes has quantised the module, which then stays where it is."""
    return any(getattr(module, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def move(pipe: Any, device: torch.device) -> None:
    """Moves the pipeline to the device, unless it is managed, is there already, or has no `to`."""
    if not hasattr(pipe, "to") or is_managed(pipe):
        return
    modules = modules_of(pipe).values()
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    if tensors and all(tensor.device == device for tensor in tensors):
        return
    if not any(map(is_packed, modules)):
        pipe.to(device)
        return
    for module in modules:  # the whole pipeline may refuse where a part does
        if not is_packed(module):
            module.to(device)
