"""Offloading with one call: what fits the device, chosen from what the installed diffusers can do, and why.

    print(wan_patches.enable_offload(pipe, "npu", dry_run=True))  # estimates, and moves nothing
    wan_patches.enable_offload(pipe, "npu")
    video = pipe(...).frames
    wan_patches.disable_offload(pipe)

Four levels, each slower and smaller than the one before:

    none    everything lies on the device
    model   a model comes when it runs and goes when the next one does (`enable_model_cpu_offload`)
    group   denoisers come block by block, encoders layer by layer, what decodes stays (group offloading)
    leaf    everything comes layer by layer

With a stream, the next block is copied while one computes, and two lie on the device. All of it is diffusers' own,
with its own bits; `wan_patches.offload.streams` has it make streams where it would not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from wan_patches.offload.streams import Streams, making, streams_on
from wan_patches.patching.objects import own_methods

__all__ = ["LEVELS", "Estimate", "OffloadPlan", "Placement", "disable_offload", "enable_offload"]

logger = logging.getLogger("wan_patches")

LEVELS = ("none", "model", "group", "leaf")

#: What is left to activations where the caller does not say: this part of the room.
RESERVED = 0.25

DEVICE, MODEL, BLOCKS, LEAVES = "stays on the device", "whole model", "block by block", "layer by layer"

_LEAVES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Embedding,
)  # fmt: skip
_HOOKS = ("lazy_prefetch_group_offloading", "layer_execution_tracker", "group_offloading")  # diffusers' names


@dataclass(frozen=True)
class Placement:
    """How one component is offloaded.

    name: of the component in the pipeline.
    kind: its class.
    how: "stays on the device", "whole model", "block by block" or "layer by layer".
    stream: the next block or layer is copied while one computes.
    weights: bytes of its parameters and buffers.
    peak: bytes of them that lie on the device at once, at most.
    pinned: bytes of them that lie in pinned host memory.
    why: why so, where there was a choice.
    """

    name: str
    kind: str
    how: str
    stream: bool
    weights: int
    peak: int
    pinned: int = 0
    why: str = ""


@dataclass(frozen=True)
class Estimate:
    """What one level would need.

    level: one of `LEVELS`.
    peak: bytes of weights on the device at once, at most.
    obstacle: why it cannot be had; empty if it can.
    placements: of every component.
    """

    level: str
    peak: int
    obstacle: str
    placements: tuple[Placement, ...] = field(repr=False)


@dataclass(frozen=True)
class OffloadPlan:
    """What `enable_offload` chose, why, and what it will need; prints as a table.

    pipeline: its class.
    device: where it computes.
    level: one of `LEVELS`.
    reason: why this one.
    streams: what was found about streams.
    estimates: of every level, the chosen one among them.
    budget: bytes that the device has room for; None if it does not tell and nobody said.
    reserve: bytes of the budget that are not for weights.
    """

    pipeline: str
    device: str
    level: str
    reason: str
    streams: str
    estimates: tuple[Estimate, ...]
    budget: int | None
    reserve: int

    @property
    def chosen(self) -> Estimate:
        """The estimate of the chosen level."""
        return next(estimate for estimate in self.estimates if estimate.level == self.level)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """How each component is offloaded."""
        return self.chosen.placements

    @property
    def peak(self) -> int:
        """Bytes of weights on the device at once, at most. Activations come on top."""
        return self.chosen.peak

    @property
    def pinned(self) -> int:
        """Bytes of pinned host memory."""
        return sum(placement.pinned for placement in self.placements)

    @property
    def fits(self) -> bool | None:
        """Whether the weights leave the reserve free; None if the budget is not known."""
        return None if self.budget is None else self.peak <= self.budget - self.reserve

    def __str__(self) -> str:
        return _text(self)


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
    """Puts a pipeline on a device that may be too small for it, by what the installed diffusers offers.

    The results have the bits of the pipeline that lies on the device whole. All or nothing: what raises leaves the
    pipeline as it was. `disable_offload(pipe)` undoes it.

    Args:
        pipe: a diffusers pipeline, its weights anywhere; not offloaded and without a device map.
        device: where to compute; None is torch's accelerator. For a device that is not number 0 make it the current
            one first, since diffusers makes streams there.
        level: `"none"`, `"model"`, `"group"`, `"leaf"`, or `"auto"`: the first of them that fits.
        stream: copy the next block while one computes. `"auto"`: for group and leaf wherever torch and diffusers can;
            True: or raise.
        blocks_per_group: for "group", how many blocks come at once. More than one excludes a stream.
        budget: bytes that the device has room for, the pipeline's own weights there included. None asks the device.
        reserve: bytes of the budget for activations and everything else that is no weight; None is a quarter.
        low_cpu_mem_usage: with a stream, pin weights when they are copied (slower) instead of all at once. Otherwise
            all streamed weights lie in pinned host memory.
        dry_run: estimate and choose, and change nothing.

    Returns:
        What was chosen and why, with what every level needs. Only the weights are estimated: the size of activations
        depends on the call.

    Raises:
        TypeError: `pipe` is not a pipeline.
        ValueError: for options or a pipeline that cannot be had so; the message says what can.
        ImportError: accelerate, which diffusers offloads with, is not installed.
    """
    _check(pipe, level, stream, blocks_per_group, budget, reserve)
    device = _device(device)
    host = _Host(pipe, device, stream, blocks_per_group, low_cpu_mem_usage)
    plan = _plan(host, level, budget, reserve)
    if plan.level != "none" and importlib.util.find_spec("accelerate") is None:
        raise ImportError("diffusers offloads by means of accelerate, which is not installed: pip install accelerate")
    if dry_run:
        return plan
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise ValueError(f"there is no {device} here: {error}") from error
    if plan.fits is False:
        logger.warning(
            "%s may not fit %s: %s of weights, and %s of room, of which %s are reserved; see the plan",
            plan.pipeline, plan.device, _bytes(plan.peak), _bytes(plan.budget or 0), _bytes(plan.reserve),
        )  # fmt: skip
    now = _Before(pipe)
    try:
        host.apply(plan)
        _before.setdefault(pipe, now)  # what an earlier call has noted is where `disable_offload` goes back to
    except BaseException:
        now.restore(pipe)
        raise
    return plan


def disable_offload(pipe: Any) -> None:
    """Undoes `enable_offload`: no hooks, every component on the device that it was on before.

    A call of the pipeline may have been interrupted before; if this one is, call it again. Weights that were copied on
    a stream stay in pinned host memory until they are moved, as those are that an interrupted call has left on the
    device.

    Raises ValueError for a pipeline that `enable_offload` has not touched.
    """
    try:
        before = _before.get(pipe)
    except TypeError:  # nothing that could have been there
        before = None
    if before is None:
        raise ValueError(f"this {type(pipe).__name__} is not offloaded by enable_offload")
    before.restore(pipe)
    del _before[pipe]


# What there is


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The models, each once, without what torch.compile has around them."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in pipe.components.items():
        part = getattr(part, "_orig_mod", part)
        if isinstance(part, nn.Module):
            found.setdefault(id(part), (name, part))
    return dict(found.values())


def _check(pipe: Any, level: str, stream: bool | str, blocks: int, budget: int | None, reserve: int | None) -> None:
    if level not in ("auto", *LEVELS):
        raise ValueError(f"unknown level {level!r}; known: auto, {', '.join(LEVELS)}")
    if stream not in (True, False, "auto"):
        raise ValueError(f"`stream` is True, False or 'auto', not {stream!r}")
    if stream is True and level in ("none", "model"):
        raise ValueError(f"level {level!r} copies nothing on a stream: use 'group', 'leaf' or 'auto'")
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"`blocks_per_group` is 1 or more, not {blocks!r}")
    if stream is True and blocks > 1:
        raise ValueError("with a stream diffusers copies one block at a time: use blocks_per_group=1 or stream=False")
    for name, value in (("budget", budget), ("reserve", reserve)):
        if value is not None and value < 0:
            raise ValueError(f"`{name}` is a number of bytes, not {value!r}")
    if not isinstance(getattr(pipe, "components", None), dict):
        raise TypeError(f"enable_offload takes a diffusers pipeline, not {type(pipe).__name__}")
    modules = _modules(pipe)
    if not modules:
        raise ValueError(f"this {type(pipe).__name__} has no models, so there is nothing to offload")
    if getattr(pipe, "hf_device_map", None):
        raise ValueError("the pipeline has a device map: call pipe.reset_device_map() first")
    if getattr(pipe, "_all_hooks", None) or any(hasattr(part, "_hf_hook") for part in modules.values()):
        raise ValueError(f"the pipeline is offloaded already: call {_way_back(pipe, 'pipe.remove_all_hooks()')} first")
    for name, module in modules.items():
        if _grouped(module):
            by_hand = f"pipe.{name}._diffusers_hook.remove_hook('group_offloading')"
            raise ValueError(f"{name} is offloaded in groups already: call {_way_back(pipe, by_hand)} first")
        if any(tensor.is_meta for tensor in _tensors(module)):
            raise ValueError(f"{name} has no weights yet (they are on the meta device): load them first")


def _way_back(pipe: Any, otherwise: str) -> str:
    return "wan_patches.disable_offload(pipe)" if pipe in _before else otherwise


def _registries(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        if (registry := getattr(part, "_diffusers_hook", None)) is not None:
            yield registry


def _grouped(module: nn.Module) -> bool:
    return any(registry.get_hook("group_offloading") is not None for registry in _registries(module))


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        if found is None and torch.cuda.is_available():
            found = torch.device("cuda")
        if found is None:
            raise ValueError("torch has no accelerator here, so there is nothing to offload from; else name the device")
        return found
    if str(device).startswith("npu") and not hasattr(torch, "npu"):
        try:
            import torch_npu  # noqa: F401
        except Exception as error:  # without CANN it is no ImportError
            raise ValueError(
                f"torch knows no NPU: importing torch_npu raised {type(error).__name__}: {error}"
            ) from error
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        raise ValueError(f"there is nothing to offload from on {device.type!r}: name an accelerator")
    return device


def _room(device: torch.device) -> int | None:
    """Bytes that are free on the device, those that torch keeps for itself included; None if it does not tell."""
    module: Any = getattr(torch, device.type, None)
    with contextlib.suppress(Exception):  # a statistic: no reason to fail
        if device.type == "mps":
            return module.recommended_max_memory() - module.current_allocated_memory()
        index = module.current_device() if device.index is None else device.index
        free = module.mem_get_info(index)[0]
        with contextlib.suppress(AttributeError):
            free += module.memory_reserved(index) - module.memory_allocated(index)
        return int(free)
    return None


# What it would need


def _tensors(*modules: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return list({id(tensor): tensor for tensor in tensors}.values())


def _size(*modules: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(*modules))


def _lists(module: nn.Module) -> list[Sequence[nn.Module]]:
    """The lists of blocks that diffusers goes by: right below the model."""
    return [list(child) for child in module.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]


def _peak_of_blocks(module: nn.Module, per_group: int, stream: bool) -> int:
    """What is in no block is there for the whole call; with a stream a block is there while the one before computes."""
    lists = _lists(module)
    sizes = [[_size(*blocks[i : i + per_group]) for i in range(0, len(blocks), per_group)] for blocks in lists]
    rest = _size(module) - _size(*(block for blocks in lists for block in blocks))
    groups = sorted((size for sizes_ in sizes for size in sizes_), reverse=True)
    if stream:
        return rest + sum(groups[:2])
    if per_group == 1:
        return rest + sum(groups[:1])
    return rest + sum(max(sizes_, default=0) for sizes_ in sizes)  # lists may be gone through in turns


def _peak_of_leaves(module: nn.Module, stream: bool) -> int:
    """Parameters of modules that are no layer (norms, tables) are taken to be there all the time."""
    leaves = [part for part in module.modules() if isinstance(part, _LEAVES)]
    rest = _size(module) - _size(*leaves)
    distinct = {tuple(map(id, _tensors(leaf))): leaf for leaf in leaves}  # tied ones are one
    sizes = sorted(map(_size, distinct.values()), reverse=True)
    return min(rest + sum(sizes[: 1 + stream]), _size(module))


def _kept_buffers(module: nn.Module, how: str) -> int:
    """What diffusers does not take back where it copies on a stream: buffers of blocks, or of layers."""
    if how == BLOCKS:
        return sum(buffer.nbytes for blocks in _lists(module) for block in blocks for buffer in block.buffers())
    return sum(b.nbytes for part in module.modules() if isinstance(part, _LEAVES) for b in part.buffers())


class _Host:
    """A pipeline, a device, and what the installed diffusers can do for the two."""

    def __init__(
        self, pipe: Any, device: torch.device, stream: bool | str, blocks_per_group: int, low_cpu_mem_usage: bool
    ) -> None:
        self.pipe, self.device = pipe, device
        self.modules = _modules(pipe)
        self.per_group = blocks_per_group
        self.low_cpu_mem_usage = low_cpu_mem_usage
        self.has_groups = _has_groups()
        self.wants_stream = stream is True
        self.streams = self._streams(stream)
        if stream is True and not self.streams.usable:
            raise ValueError(f"there is no stream to copy on: {self.streams.reason}; use stream='auto'")

    def _streams(self, stream: bool | str) -> Streams:
        if not self.has_groups:
            return Streams(False, False, "the installed diffusers has no group offloading")
        if stream is False:
            return Streams(False, False, "not wanted")
        if self.per_group > 1:
            return Streams(False, False, "diffusers copies one block at a time on them, and more are wanted")
        return streams_on(self.device)

    def estimates(self, room: int | None) -> tuple[Estimate, ...]:
        """What each level needs; `room` is for weights, and says whether a decoder can stay."""
        group = self._estimate("group", tuple(self._grouped(n, m, True) for n, m in self.modules.items()))
        if room is not None and group.peak > room:
            group = self._estimate("group", tuple(self._grouped(n, m, False) for n, m in self.modules.items()))
        return (
            self._estimate("none", tuple(self._whole(n, m, DEVICE) for n, m in self.modules.items())),
            self._estimate("model", tuple(self._whole(n, m, MODEL) for n, m in self.modules.items())),
            group,
            self._estimate("leaf", tuple(self._leaves(n, m) for n, m in self.modules.items())),
        )

    def _estimate(self, level: str, placements: tuple[Placement, ...]) -> Estimate:
        if level == "model":
            peak = self._peak_of_models({placement.name: placement.weights for placement in placements})
        else:  # one component runs at a time, and takes its weights away when it has
            staying = sum(placement.peak for placement in placements if placement.how == DEVICE)
            kept = sum(_kept_buffers(self.modules[p.name], p.how) for p in placements if p.stream)
            peak = staying + kept + max((p.peak for p in placements if p.how != DEVICE), default=0)
        return Estimate(level, peak, self._obstacle(level), placements)

    def _peak_of_models(self, weights: Mapping[str, int]) -> int:
        """The largest model, and those that stay on the device beside it.

        A model goes when the next one in diffusers' sequence comes. A VAE that has encoded stays until it decodes, a
        model that is in no sequence until the end.
        """
        sequence = (getattr(self.pipe, "model_cpu_offload_seq", None) or "").split("->")
        excluded = getattr(self.pipe, "_exclude_from_cpu_offload", ())
        staying = {
            name
            for name, module in self.modules.items()
            if name not in sequence or name in excluded or _is_codec(module)
        }
        others = [size for name, size in weights.items() if name not in staying]
        return sum(weights[name] for name in staying) + max(others, default=0)

    def _obstacle(self, level: str) -> str:
        if level == "model" and not getattr(self.pipe, "model_cpu_offload_seq", None):
            return f"{type(self.pipe).__name__} names no order of its models (`model_cpu_offload_seq`)"
        if level not in ("group", "leaf"):
            return ""
        packed = [name for name, module in self.modules.items() if _of_bitsandbytes(module)]
        if packed:
            return f"bitsandbytes has quantised {', '.join(packed)}, whose weights cannot be moved one by one"
        if level == "group" and not self.has_groups:
            return "the installed diffusers has no group offloading"
        return ""

    def _whole(self, name: str, module: nn.Module, how: str, why: str = "") -> Placement:
        size = _size(module)
        return Placement(name, type(module).__name__, how, False, size, size, 0, why)

    def _grouped(self, name: str, module: nn.Module, codecs_stay: bool) -> Placement:
        if _is_codec(module) and codecs_stay:
            return self._whole(name, module, DEVICE, "its layers would be copied for every few frames")
        if _is_codec(module) or not (name.startswith(("transformer", "unet")) and any(_lists(module))):
            return self._leaves(name, module)
        stream = self.streams.usable
        pinned = _size(*(block for blocks in _lists(module) for block in blocks))
        return Placement(
            name, type(module).__name__, BLOCKS, stream, _size(module),
            _peak_of_blocks(module, self.per_group, stream), pinned * (stream and not self.low_cpu_mem_usage),
        )  # fmt: skip

    def _leaves(self, name: str, module: nn.Module) -> Placement:
        if not getattr(module, "_supports_group_offloading", True) and self.has_groups:
            return self._whole(name, module, DEVICE, "diffusers cannot offload it in parts")
        stream, why, size = self.streams.usable, "", _size(module)
        if _is_codec(module):  # the order of layers is learnt from a call of `forward`, and there is none
            why = "it is not called by `forward`, from which diffusers would learn the order" if stream else ""
            stream = False
        return Placement(
            name, type(module).__name__, LEAVES, stream, size,
            _peak_of_leaves(module, stream), size * (stream and not self.low_cpu_mem_usage), why,
        )  # fmt: skip

    def apply(self, plan: OffloadPlan) -> None:
        """Makes it so."""
        if plan.level == "none":
            for module in self.modules.values():
                if not _of_bitsandbytes(module):  # it is there, and may refuse
                    module.to(self.device)
        elif plan.level == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        elif not self.has_groups:
            self.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            with making(self.device, self.streams):
                for placement in plan.placements:
                    self._hook(self.modules[placement.name], placement)

    def _hook(self, module: nn.Module, placement: Placement) -> None:
        from diffusers.hooks.group_offloading import apply_group_offloading

        if placement.how == DEVICE:
            module.to(self.device)
            return
        # Not with `record_stream`: copies could then run ahead of the computation by any number of blocks
        options: dict[str, Any] = {
            "onload_device": self.device,
            "offload_device": torch.device("cpu"),
            "offload_type": "block_level" if placement.how == BLOCKS else "leaf_level",
            "use_stream": placement.stream,
            "low_cpu_mem_usage": self.low_cpu_mem_usage and placement.stream,
        }
        if placement.how == BLOCKS:
            options["num_blocks_per_group"] = self.per_group
        own: Any = getattr(module, "enable_group_offload", None)  # refuses what diffusers knows not to work
        own(**options) if own is not None else apply_group_offloading(module, **options)


def _has_groups() -> bool:
    try:
        from diffusers.hooks import group_offloading  # noqa: F401
    except ImportError:  # before 0.33
        return False
    return True


def _is_codec(module: nn.Module) -> bool:
    """Whether it is called by `encode` and `decode`: hooks of the whole model do not see that."""
    return callable(getattr(module, "decode", None))


def _of_bitsandbytes(module: nn.Module) -> bool:
    return any(getattr(module, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


# What is chosen


def _plan(host: _Host, level: str, budget: int | None, reserve: int | None) -> OffloadPlan:
    if budget is None:
        budget = _room(host.device)
        if budget is not None:
            there = (
                t for module in host.modules.values() for t in _tensors(module) if t.device.type == host.device.type
            )
            budget += sum(tensor.nbytes for tensor in there)
    if reserve is None:
        reserve = int((budget or 0) * RESERVED)
    room = None if budget is None else budget - reserve
    estimates = host.estimates(room)
    possible = [e for e in estimates if not e.obstacle]
    if level == "auto":
        suitable = [e for e in possible if e.level in ("group", "leaf")] if host.wants_stream else possible
        if not suitable:
            raise ValueError(f"there is nothing to copy on a stream: {estimates[-1].obstacle}; use stream='auto'")
        chosen, reason = _choose(host, suitable, room)
    else:
        chosen = next(e for e in estimates if e.level == level)
        if chosen.obstacle and level == "group" and not host.has_groups:
            chosen, reason = estimates[-1], "the nearest to 'group'"
        elif chosen.obstacle:
            others = ", ".join(repr(e.level) for e in possible)
            raise ValueError(f"level {level!r} is not possible: {chosen.obstacle}; use {others}")
        else:
            reason = "you named it"
        if room is not None and chosen.peak > room:
            smaller = [e.level for e in possible if e.peak <= room]
            reason += f"; it may not fit{', unlike ' + repr(smaller[0]) if smaller else ', nor does anything smaller'}"
    if chosen.level == "leaf" and not host.has_groups:
        reason += "; by sequential offload, since the installed diffusers has no group offloading"
    return OffloadPlan(
        pipeline=type(host.pipe).__name__,
        device=str(host.device),
        level=chosen.level,
        reason=reason,
        streams=host.streams.reason,
        estimates=estimates,
        budget=budget,
        reserve=reserve,
    )


def _choose(host: _Host, possible: list[Estimate], room: int | None) -> tuple[Estimate, str]:
    """The first level that fits, or the smallest."""
    if room is None:
        chosen = next((e for e in possible if e.level == "group"), possible[-1])
        return chosen, "the device does not tell what is free: name a `budget` to have less offloaded, or more"
    fitting = next((e for e in possible if e.peak <= room), None)
    if fitting is not None:
        larger = ", ".join(f"{e.level!r}" for e in possible[: possible.index(fitting)])
        return fitting, f"the first level that fits; {larger} would not" if larger else "everything fits"
    smallest = min(possible, key=lambda estimate: estimate.peak)
    short = _bytes(smallest.peak - room)
    return (
        smallest,
        f"the smallest that is possible, and still {short} too large: name a smaller `reserve`, or another device",
    )


# Putting back


class _Before:
    """Where the components of a pipeline were, and which of their parts had a `forward` in themselves."""

    def __init__(self, pipe: Any) -> None:
        modules = _modules(pipe)
        tensors = {name: next(iter(_tensors(module)), None) for name, module in modules.items()}
        self.devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
        self.attributes = {name: vars(pipe).get(name, _ABSENT) for name in ("_offload_gpu_id", "_offload_device")}
        parts = (part for module in modules.values() for part in module.modules())
        self.with_forward = weakref.WeakSet(part for part in parts if "forward" in vars(part))

    def restore(self, pipe: Any) -> None:
        modules = _modules(pipe)
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
            for registry in list(_registries(module)):
                for hook in _HOOKS:
                    registry.remove_hook(hook, recurse=False)
            for part in module.modules():
                if "forward" in vars(part).keys() - own_methods(part) and part not in self.with_forward:
                    del part.forward  # the class's own, which whoever removes a hook puts there
            if name in self.devices and not _of_bitsandbytes(module):
                module.to(self.devices[name])


def _wait_for_copies(module: nn.Module) -> None:
    """A call that was interrupted leaves the copy of its next group under way: there is no weight to move yet."""
    for registry in _registries(module):
        hook = registry.get_hook("group_offloading")
        if hook is not None and hook.group.stream is not None:
            hook.group.stream.synchronize()


_ABSENT = object()
_before: weakref.WeakKeyDictionary[Any, _Before] = weakref.WeakKeyDictionary()


# What people read


def _bytes(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size / 1024:.1f} KiB" if size >= 1024 else f"{size} bytes"


def _text(plan: OffloadPlan) -> str:
    from rich import box
    from rich.table import Table

    from wan_patches.tables import text

    parts = Table(box=box.SIMPLE)
    for column in ("component", "class", "how", "stream", "weights", "on the device", "why"):
        parts.add_column(column, overflow="fold", justify="right" if column in ("weights", "on the device") else "left")
    for p in plan.placements:
        stream = "yes" if p.stream else "no"
        parts.add_row(p.name, p.kind, p.how, stream, _bytes(p.weights), _bytes(p.peak), p.why)
    levels = Table(box=box.SIMPLE)
    for column in ("level", "peak of weights", ""):
        levels.add_column(column, overflow="fold", justify="right" if column == "peak of weights" else "left")
    for e in plan.estimates:
        fits = "" if plan.budget is None else "fits" if e.peak <= plan.budget - plan.reserve else "too large"
        mark = f"{e.obstacle or fits}{', chosen' if e.level == plan.level and fits else ''}"
        levels.add_row(e.level, _bytes(e.peak), mark or ("chosen" if e.level == plan.level else ""))
    room = (
        "not known" if plan.budget is None else f"{_bytes(plan.budget)}, of which {_bytes(plan.reserve)} are reserved"
    )
    lines = [
        f"{plan.pipeline} on {plan.device}: level {plan.level!r} ({plan.reason})",
        parts,
        levels,
        f"  room on the device: {room}; activations are not estimated",
        f"  streams: {plan.streams}",
    ]
    if plan.pinned:
        lines.append(f"  pinned host memory: {_bytes(plan.pinned)} (low_cpu_mem_usage=True needs less, and is slower)")
    return text(*lines)
