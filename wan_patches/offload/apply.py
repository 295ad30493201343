"""`enable_offload` and `disable_offload`: applies a plan with diffusers' own offloading, and reverts it."""

from __future__ import annotations

import importlib.util
import logging
import weakref
from typing import Any

import torch
from torch import nn

from wan_patches.offload import report
from wan_patches.offload.plan import BLOCKS, DEVICE, LEVELS, Host, OffloadPlan, Placement, accelerator, make_plan
from wan_patches.offload.streams import group_offloading, making
from wan_patches.patching.objects import own_methods
from wan_patches.pipelines.components import (
    distinct_modules,
    has_accelerate_hooks,
    has_device_map,
    has_hook,
    hook_registries,
    is_quantized_by_bitsandbytes,
    tensors,
)

__all__ = ["disable_offload", "enable_offload"]

logger = logging.getLogger("wan_patches")

_HOOKS = ("lazy_prefetch_group_offloading", "layer_execution_tracker", "group_offloading")  # diffusers' names


def enable_offload(
    pipe: Any,
    device: str | torch.device | None = None,
    *,
    level: str = "auto",
    stream: bool | str = "auto",
    blocks_per_group: int = 1,
    budget: int | None = None,
    reserve: int | None = None,
    low_cpu_mem_usage: bool = False,
    dry_run: bool = False,
) -> OffloadPlan:
    """Puts a pipeline on a device that may be too small for it, using the offloading of the installed diffusers.

    Results are bit-identical to those of the pipeline without offloading. An exception leaves the pipeline unchanged.
    `disable_offload(pipe)` reverts the call.

    Args:
        pipe: a diffusers pipeline, not offloaded and without a device map; its weights may be on any device.
        device: the device to compute on; None is torch's accelerator. For a device with an index other than 0, make it
            the current one first, because diffusers creates streams there.
        level: `"none"`, `"model"`, `"group"`, `"leaf"`, or `"auto"` for the first of them that fits.
        stream: whether to copy the next block while the current one computes. `"auto"` does so for group and leaf if
            torch and diffusers support it; True raises if they do not.
        blocks_per_group: for "group", the number of blocks loaded together. More than one excludes a stream.
        budget: bytes available on the device, including those of the pipeline's weights there. None queries the device.
        reserve: bytes of the budget for activations and everything else besides weights; None is a quarter.
        low_cpu_mem_usage: with a stream, pin weights when they are copied (slower) instead of all at once. Otherwise
            all streamed weights are in pinned host memory.
        dry_run: only estimate and choose; change nothing.

    Returns:
        The chosen level, the reason, and the memory needs of every level. Only weights are estimated, because the size
        of activations depends on the call.

    Raises:
        TypeError: `pipe` is not a pipeline.
        ValueError: the options are invalid, or not possible for this pipeline; the message names valid ones.
        ImportError: accelerate is not installed; diffusers' offloading requires it.
    """
    _check_options(level, stream, blocks_per_group, budget, reserve)
    _check_pipeline(pipe)
    device = accelerator(device)
    host = Host(pipe, device, stream, blocks_per_group, low_cpu_mem_usage)
    plan = make_plan(host, level, budget, reserve)
    if plan.level != "none" and importlib.util.find_spec("accelerate") is None:
        raise ImportError("diffusers' offloading requires accelerate, which is not installed: pip install accelerate")
    if dry_run:
        return plan
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise ValueError(f"the device {device} is not available: {error}") from error
    if plan.fits is False:
        logger.warning(
            "%s may not fit on %s: %s of weights, but %s available, of which %s are reserved; see the plan",
            plan.pipeline, plan.device, report.size(plan.peak), report.size(plan.budget or 0),
            report.size(plan.reserve),
        )  # fmt: skip
    now = _Before(pipe)
    try:
        _apply(host, plan)
        _before.setdefault(pipe, now)  # keeps the state noted by an earlier call, which `disable_offload` restores
    except BaseException:
        now.restore(pipe)
        raise
    return plan


def disable_offload(pipe: Any) -> None:
    """Reverts `enable_offload`: removes all hooks and moves every component back to its previous device.

    Safe after an interrupted pipeline call; if this function itself is interrupted, call it again. Weights that were
    copied on a stream stay in pinned host memory until they are moved, and so do weights that an interrupted pipeline
    call left on the device.

    Raises:
        ValueError: `enable_offload` was not applied to this pipeline.
    """
    try:
        before = _before.get(pipe)
    except TypeError:  # the object is not hashable
        before = None
    if before is None:
        raise ValueError(f"this {type(pipe).__name__} was not offloaded by enable_offload")
    before.restore(pipe)
    del _before[pipe]


# Checks


def _check_options(level: str, stream: bool | str, blocks: int, budget: int | None, reserve: int | None) -> None:
    if level not in ("auto", *LEVELS):
        raise ValueError(f"unknown level {level!r}; known: auto, {', '.join(LEVELS)}")
    if stream not in (True, False, "auto"):
        raise ValueError(f"`stream` must be True, False or 'auto', not {stream!r}")
    if stream is True and level in ("none", "model"):
        raise ValueError(f"level {level!r} does not support streams: use 'group', 'leaf' or 'auto'")
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"`blocks_per_group` must be an integer of at least 1, not {blocks!r}")
    if stream is True and blocks > 1:
        raise ValueError("with a stream, diffusers copies one block at a time: use blocks_per_group=1 or stream=False")
    for name, value in (("budget", budget), ("reserve", reserve)):
        if value is not None and value < 0:
            raise ValueError(f"`{name}` must be a number of bytes, not {value!r}")


def _check_pipeline(pipe: Any) -> None:
    if not isinstance(getattr(pipe, "components", None), dict):
        raise TypeError(f"enable_offload expects a diffusers pipeline, not {type(pipe).__name__}")
    modules = distinct_modules(pipe)
    if not modules:
        raise ValueError(f"this {type(pipe).__name__} has no models, so there is nothing to offload")
    if has_device_map(pipe):
        raise ValueError("the pipeline has a device map: call pipe.reset_device_map() first")
    if has_accelerate_hooks(pipe):
        raise ValueError(f"the pipeline is offloaded already: call {_way_back(pipe, 'pipe.remove_all_hooks()')} first")
    for name, module in modules.items():
        if has_hook(module, "group_offloading"):
            by_hand = f"pipe.{name}._diffusers_hook.remove_hook('group_offloading')"
            raise ValueError(f"{name} is offloaded in groups already: call {_way_back(pipe, by_hand)} first")
        if any(tensor.is_meta for tensor in tensors(module)):
            raise ValueError(f"{name} has no weights yet (they are on the meta device): load them first")


def _way_back(pipe: Any, otherwise: str) -> str:
    return "wan_patches.disable_offload(pipe)" if pipe in _before else otherwise


# Applying a plan


def _apply(host: Host, plan: OffloadPlan) -> None:
    if plan.level == "none":
        for module in host.modules.values():
            if not is_quantized_by_bitsandbytes(
                module
            ):  # quantised weights are on the device already and may refuse to be moved
                module.to(host.device)
    elif plan.level == "model":
        host.pipe.enable_model_cpu_offload(device=host.device)
    elif not host.has_groups:
        host.pipe.enable_sequential_cpu_offload(device=host.device)
    else:
        with making(host.device, host.streams):
            for placement in plan.placements:
                _hook(host, host.modules[placement.name], placement)


def _hook(host: Host, module: nn.Module, placement: Placement) -> None:
    if placement.how == DEVICE:
        module.to(host.device)
        return
    # without `record_stream`, with which copies could run any number of blocks ahead of the computation
    options: dict[str, Any] = {
        "onload_device": host.device,
        "offload_device": torch.device("cpu"),
        "offload_type": "block_level" if placement.how == BLOCKS else "leaf_level",
        "use_stream": placement.stream,
        "low_cpu_mem_usage": host.low_cpu_mem_usage and placement.stream,
    }
    if placement.how == BLOCKS:
        options["num_blocks_per_group"] = host.per_group
    own: Any = getattr(module, "enable_group_offload", None)  # raises for models that diffusers does not support
    own(**options) if own is not None else group_offloading.apply_group_offloading(module, **options)


# Reverting


class _Before:
    """The state of a pipeline before the call: devices of its components, and modules that override `forward`."""

    def __init__(self, pipe: Any) -> None:
        modules = distinct_modules(pipe)
        firsts = {name: next(iter(tensors(module)), None) for name, module in modules.items()}
        self.devices = {name: tensor.device for name, tensor in firsts.items() if tensor is not None}
        self.attributes = {name: vars(pipe).get(name, _ABSENT) for name in ("_offload_gpu_id", "_offload_device")}
        parts = (part for module in modules.values() for part in module.modules())
        self.with_forward = weakref.WeakSet(part for part in parts if "forward" in vars(part))

    def restore(self, pipe: Any) -> None:
        modules = distinct_modules(pipe)
        for module in modules.values():
            _wait_for_copies(module)
        if any(hasattr(module, "_hf_hook") for module in modules.values()):
            pipe.remove_all_hooks()
        for name, value in self.attributes.items():
            if value is _ABSENT:
                vars(pipe).pop(name, None)
            else:
                setattr(pipe, name, value)
        for name, module in modules.items():
            for registry in list(hook_registries(module)):
                for hook in _HOOKS:
                    registry.remove_hook(hook, recurse=False)
            for part in module.modules():
                if "forward" in vars(part).keys() - own_methods(part) and part not in self.with_forward:
                    del part.forward  # the class's own method, which removing a hook leaves on the instance
            if name in self.devices and not is_quantized_by_bitsandbytes(module):
                module.to(self.devices[name])


def _wait_for_copies(module: nn.Module) -> None:
    """Waits for the pending copy of the next group after an interrupted call; otherwise its weights arrive later."""
    for registry in hook_registries(module):
        hook = registry.get_hook("group_offloading")
        if hook is not None and hook.group.stream is not None:
            hook.group.stream.synchronize()


_ABSENT = object()
_before: weakref.WeakKeyDictionary[Any, _Before] = weakref.WeakKeyDictionary()
