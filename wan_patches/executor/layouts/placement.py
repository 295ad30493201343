"""Utilities shared by layouts: devices, parts of a pipeline, size of the group, and moving of pipelines."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from wan_patches.pipelines.components import denoisers, is_managed, is_quantized_by_bitsandbytes, modules, tensors


def device_named(name: str | torch.device) -> torch.device:
    """Returns the device of that name. For an NPU, imports torch_npu, which registers the device type."""
    if str(name).startswith("npu"):
        import torch_npu  # noqa: F401
    return torch.device(name)


def make_current(device: torch.device) -> torch.device:
    """Makes the device current, as meshes and FSDP expect, and returns it with its index."""
    if device.type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(device)
    if device.index is None:
        device = torch.device(device.type, module.current_device())
    module.set_device(device)
    torch.empty(0, device=device)  # initialises the device; a mesh would otherwise select one itself
    return device


def ranks_in_group(layout: str, wanted: str = "2 or more", most: int | None = None) -> int:
    """Returns the number of ranks of this process's group.

    Args:
        layout, wanted: name of the layout, and description of the number of ranks that it needs, for the message.
        most: maximum number of ranks.

    Raises:
        ValueError: there is only one rank, or there are more than `most`.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world < 2 or (most is not None and world > most):
        raise ValueError(f"layout {layout!r} needs {wanted} devices in a group, not {world}")
    return world


def denoisers_of(pipe: Any, layout: str) -> list[nn.Module]:
    """Returns the pipeline's transformers or UNets.

    Raises:
        ValueError: there are none; the message names the layout and the pipeline's components.
    """
    found = list(denoisers(pipe).values())
    if not found:
        raise ValueError(
            f"layout {layout!r} needs a diffusers pipeline with a `transformer` or a `unet`; {type(pipe).__name__} has "
            + (", ".join(modules(pipe)) or "no components")
        )
    return found


def move(pipe: Any, device: torch.device) -> None:
    """Moves the pipeline to the device, unless it is managed, already there, or has no `to`."""
    if not hasattr(pipe, "to") or is_managed(pipe):
        return
    parts = modules(pipe).values()
    weights = tensors(*parts)
    if weights and all(tensor.device == device for tensor in weights):
        return
    if not any(map(is_quantized_by_bitsandbytes, parts)):
        pipe.to(device)
        return
    for module in parts:  # `pipe.to` may fail if one part cannot be moved
        if not is_quantized_by_bitsandbytes(module):
            module.to(device)
