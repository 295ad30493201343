"""What several layouts need: devices, the parts of a pipeline, the size of the group, and moving."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from wan_patches.pipelines.components import denoisers, is_managed, is_quantized_by_bitsandbytes, modules, tensors


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


def denoisers_of(pipe: Any, layout: str) -> list[nn.Module]:
    """Returns the pipeline's transformers or UNets.

    Raises:
        ValueError: there are none; the message names the layout and what there is.
    """
    found = list(denoisers(pipe).values())
    if not found:
        raise ValueError(
            f"layout {layout!r} needs a diffusers pipeline with a `transformer` or a `unet`; {type(pipe).__name__} has "
            + (", ".join(modules(pipe)) or "no components")
        )
    return found


def move(pipe: Any, device: torch.device) -> None:
    """Moves the pipeline to the device, unless it is managed, is there already, or has no `to`."""
    if not hasattr(pipe, "to") or is_managed(pipe):
        return
    parts = modules(pipe).values()
    weights = tensors(*parts)
    if weights and all(tensor.device == device for tensor in weights):
        return
    if not any(map(is_quantized_by_bitsandbytes, parts)):
        pipe.to(device)
        return
    for module in parts:  # the whole pipeline may refuse where a part does
        if not is_quantized_by_bitsandbytes(module):
            module.to(device)
