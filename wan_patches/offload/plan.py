"""Plans of offloading: what each level needs of a pipeline on a device, and which one is chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from wan_patches.offload import report
from wan_patches.offload.streams import Streams, group_offloading, streams_on
from wan_patches.pipelines.components import distinct_modules, is_denoiser, is_quantized_by_bitsandbytes, tensors

__all__ = ["LEVELS", "Estimate", "Host", "OffloadPlan", "Placement", "accelerator", "make_plan"]

LEVELS = ("none", "model", "group", "leaf")

#: The part of the room that is left to activations if the caller does not say.
RESERVED = 0.25

DEVICE, MODEL, BLOCKS, LEAVES = "stays on the device", "whole model", "block by block", "layer by layer"

_LEAVES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Embedding,
)  # fmt: skip


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
    why: the reason, where there was a choice.
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
    """The needs of one level.

    level: one of `LEVELS`.
    peak: bytes of weights on the device at once, at most.
    obstacle: why it is not possible; empty if it is.
    placements: of every component.
    """

    level: str
    peak: int
    obstacle: str
    placements: tuple[Placement, ...] = field(repr=False)


@dataclass(frozen=True)
class OffloadPlan:
    """The choice of `enable_offload`, its reason and its needs; prints as a table.

    pipeline: its class.
    device: where it computes.
    level: one of `LEVELS`.
    reason: why this one.
    streams: whether and why blocks are copied on a stream.
    estimates: of every level, the chosen one among them.
    budget: bytes that the device has room for; None if neither the device nor the caller says.
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
        return report.text(self)


def accelerator(device: str | torch.device | None) -> torch.device:
    """Returns the device to compute on; torch's accelerator for None.

    Raises:
        ValueError: torch has no accelerator, does not know the device, or the device is the one to offload to.
    """
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
    """Returns the free bytes of a device, with those in torch's cache; None if it does not tell."""
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


def _size(*modules: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors(*modules))


def _direct_lists(module: nn.Module) -> list[Sequence[nn.Module]]:
    """Returns the lists right below the model, by which diffusers' group offloading goes.

    Its rule, and not that of `block_lists`: sequences count, and lists in parts of the model do not.
    """
    return [list(child) for child in module.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]


def _peak_of_blocks(module: nn.Module, per_group: int, stream: bool) -> int:
    """Returns the most bytes on the device at once if the model comes block by block.

    Weights outside of blocks are there for the whole call; with a stream, a block is there while the one before it
    computes.
    """
    lists = _direct_lists(module)
    sizes = [[_size(*blocks[i : i + per_group]) for i in range(0, len(blocks), per_group)] for blocks in lists]
    rest = _size(module) - _size(*(block for blocks in lists for block in blocks))
    groups = sorted((size for sizes_ in sizes for size in sizes_), reverse=True)
    if stream:
        return rest + sum(groups[:2])
    if per_group == 1:
        return rest + sum(groups[:1])
    return rest + sum(max(sizes_, default=0) for sizes_ in sizes)  # the model may go through its lists in turns


def _peak_of_leaves(module: nn.Module, stream: bool) -> int:
    """Returns the most bytes on the device at once if the model comes layer by layer.

    Parameters of modules that are not layers (norms, tables) are taken to be there all the time.
    """
    leaves = [part for part in module.modules() if isinstance(part, _LEAVES)]
    rest = _size(module) - _size(*leaves)
    distinct = {tuple(map(id, tensors(leaf))): leaf for leaf in leaves}  # tied ones are one
    sizes = sorted(map(_size, distinct.values()), reverse=True)
    return min(rest + sum(sizes[: 1 + stream]), _size(module))


def _kept_buffers(module: nn.Module, how: str) -> int:
    """Returns the bytes that stay on the device where diffusers copies on a stream: buffers of blocks, or of layers."""
    if how == BLOCKS:
        return sum(buffer.nbytes for blocks in _direct_lists(module) for block in blocks for buffer in block.buffers())
    return sum(b.nbytes for part in module.modules() if isinstance(part, _LEAVES) for b in part.buffers())


class Host:
    """A pipeline, a device, and what the installed diffusers can do for the two.

    modules: the pipeline's models by name, without torch.compile's wrappers.
    per_group: blocks that come at once.
    has_groups: the installed diffusers has group offloading.
    streams: whether weights can be copied on a stream of the device.

    Raises:
        ValueError: `stream` is True, and there is none.
    """

    def __init__(
        self, pipe: Any, device: torch.device, stream: bool | str, blocks_per_group: int, low_cpu_mem_usage: bool
    ) -> None:
        self.pipe, self.device = pipe, device
        self.modules = distinct_modules(pipe)
        self.per_group = blocks_per_group
        self.low_cpu_mem_usage = low_cpu_mem_usage
        self.has_groups = group_offloading is not None
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
        """Returns the needs of each level; `room`, in bytes of weights, decides whether a decoder stays."""
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
        else:  # one component runs at a time, and its weights leave after it
            staying = sum(placement.peak for placement in placements if placement.how == DEVICE)
            kept = sum(_kept_buffers(self.modules[p.name], p.how) for p in placements if p.stream)
            peak = staying + kept + max((p.peak for p in placements if p.how != DEVICE), default=0)
        return Estimate(level, peak, self._obstacle(level), placements)

    def _peak_of_models(self, weights: Mapping[str, int]) -> int:
        """Returns the bytes of the largest model and of those that stay on the device beside it.

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
        packed = [name for name, module in self.modules.items() if is_quantized_by_bitsandbytes(module)]
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
        if _is_codec(module) or not (is_denoiser(name) and any(_direct_lists(module))):
            return self._leaves(name, module)
        stream = self.streams.usable
        pinned = _size(*(block for blocks in _direct_lists(module) for block in blocks))
        return Placement(
            name, type(module).__name__, BLOCKS, stream, _size(module),
            _peak_of_blocks(module, self.per_group, stream), pinned * (stream and not self.low_cpu_mem_usage),
        )  # fmt: skip

    def _leaves(self, name: str, module: nn.Module) -> Placement:
        if not getattr(module, "_supports_group_offloading", True) and self.has_groups:
            return self._whole(name, module, DEVICE, "diffusers cannot offload it in parts")
        stream, why, size = self.streams.usable, "", _size(module)
        if _is_codec(module):  # diffusers learns the order of layers from a call of `forward`
            why = "it is not called by `forward`, from which diffusers would learn the order" if stream else ""
            stream = False
        return Placement(
            name, type(module).__name__, LEAVES, stream, size,
            _peak_of_leaves(module, stream), size * (stream and not self.low_cpu_mem_usage), why,
        )  # fmt: skip


def _is_codec(module: nn.Module) -> bool:
    """Whether the pipeline calls `encode` and `decode` of a model, which hooks of the whole model do not see."""
    return callable(getattr(module, "decode", None))


# What is chosen


def make_plan(host: Host, level: str, budget: int | None, reserve: int | None) -> OffloadPlan:
    """Chooses a level for a pipeline on a device.

    Args:
        host: the pipeline and the device.
        level: one of `LEVELS`, or "auto" for the first that fits.
        budget: bytes that the device has room for; None asks the device.
        reserve: bytes of the budget for activations; None is the part `RESERVED`.

    Raises:
        ValueError: the level is not possible for this pipeline.
    """
    if budget is None:
        budget = _room(host.device)
        if budget is not None:
            there = (
                t for module in host.modules.values() for t in tensors(module) if t.device.type == host.device.type
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


def _choose(host: Host, possible: list[Estimate], room: int | None) -> tuple[Estimate, str]:
    """Returns the first level that fits, or the smallest, and the reason."""
    if room is None:
        chosen = next((e for e in possible if e.level == "group"), possible[-1])
        return chosen, "the device does not tell what is free: name a `budget` to have less offloaded, or more"
    fitting = next((e for e in possible if e.peak <= room), None)
    if fitting is not None:
        larger = ", ".join(f"{e.level!r}" for e in possible[: possible.index(fitting)])
        return fitting, f"the first level that fits; {larger} would not" if larger else "everything fits"
    smallest = min(possible, key=lambda estimate: estimate.peak)
    short = report.size(smallest.peak - room)
    return (
        smallest,
        f"the smallest that is possible, and still {short} too large: name a smaller `reserve`, or another device",
    )
