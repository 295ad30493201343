"""Plans offloading: estimates what each level needs of a device, and chooses a level."""

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

#: The default fraction of the budget that is reserved for activations.
RESERVED = 0.25

DEVICE, MODEL, BLOCKS, LEAVES = "stays on the device", "whole model", "block by block", "layer by layer"

_LEAVES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Embedding,
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """How one component is offloaded.

    name: the component's name in the pipeline.
    kind: the component's class.
    how: "stays on the device", "whole model", "block by block" or "layer by layer".
    stream: whether the next block or layer is copied while the current one computes.
    weights: bytes of parameters and buffers.
    peak: maximum bytes of them on the device at once.
    pinned: bytes of them in pinned host memory.
    why: the reason, if there was a choice.
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
    """Memory needs of one level.

    level: one of `LEVELS`.
    peak: maximum bytes of weights on the device at once.
    obstacle: why the level is not possible; empty if it is.
    placements: of all components.
    """

    level: str
    peak: int
    obstacle: str
    placements: tuple[Placement, ...] = field(repr=False)


@dataclass(frozen=True)
class OffloadPlan:
    """The level chosen by `enable_offload`, its reason and its memory needs; prints as a table.

    pipeline: class of the pipeline.
    device: the device to compute on.
    level: one of `LEVELS`.
    reason: why this level was chosen.
    streams: whether blocks are copied on a stream, and why.
    estimates: of every level, including the chosen one.
    budget: bytes available on the device; None if neither the device nor the caller states them.
    reserve: bytes of the budget that are not available for weights.
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
        """Estimate of the chosen level."""
        return next(estimate for estimate in self.estimates if estimate.level == self.level)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """How each component is offloaded."""
        return self.chosen.placements

    @property
    def peak(self) -> int:
        """Maximum bytes of weights on the device at once, without activations."""
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
    """Returns the device to compute on; for None, torch's accelerator.

    Raises:
        ValueError: torch has no accelerator or does not know the device, or the device is the one to offload to.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        if found is None and torch.cuda.is_available():
            found = torch.device("cuda")
        if found is None:
            raise ValueError("torch found no accelerator to offload from; if there is one, pass its device")
        return found
    if str(device).startswith("npu") and not hasattr(torch, "npu"):
        try:
            import torch_npu  # noqa: F401
        except Exception as error:  # without CANN it is not an ImportError
            raise ValueError(
                f"the NPU is not available: importing torch_npu raised {type(error).__name__}: {error}"
            ) from error
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        raise ValueError(f"cannot offload from {device.type!r}: pass an accelerator")
    return device


def _room(device: torch.device) -> int | None:
    """Returns the free bytes of a device, including torch's cache; None if the backend does not report them."""
    module: Any = getattr(torch, device.type, None)
    with contextlib.suppress(Exception):  # a statistic is optional
        if device.type == "mps":
            return module.recommended_max_memory() - module.current_allocated_memory()
        index = module.current_device() if device.index is None else device.index
        free = module.mem_get_info(index)[0]
        with contextlib.suppress(AttributeError):
            free += module.memory_reserved(index) - module.memory_allocated(index)
        return int(free)
    return None


# Estimates


def _size(*modules: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors(*modules))


def _direct_lists(module: nn.Module) -> list[Sequence[nn.Module]]:
    """Returns the module lists directly below the model, which diffusers' group offloading uses.

    Follows diffusers' rule, which differs from `block_lists`: sequences count, and lists in submodules do not.
    """
    return [list(child) for child in module.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]


def _peak_of_blocks(module: nn.Module, per_group: int, stream: bool) -> int:
    """Returns the maximum bytes on the device at once if the model is loaded block by block.

    Weights outside of blocks stay for the whole call. With a stream, a block is on the device while the previous one
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
    return rest + sum(max(sizes_, default=0) for sizes_ in sizes)  # the model may alternate between its lists


def _peak_of_leaves(module: nn.Module, stream: bool) -> int:
    """Returns the maximum bytes on the device at once if the model is loaded layer by layer.

    Parameters of modules that are not layers (norms, tables) are assumed to stay on the device.
    """
    leaves = [part for part in module.modules() if isinstance(part, _LEAVES)]
    rest = _size(module) - _size(*leaves)
    distinct = {tuple(map(id, tensors(leaf))): leaf for leaf in leaves}  # tied layers count once
    sizes = sorted(map(_size, distinct.values()), reverse=True)
    return min(rest + sum(sizes[: 1 + stream]), _size(module))


def _kept_buffers(module: nn.Module, how: str) -> int:
    """Returns the bytes of buffers (of blocks or layers) that stay on the device if diffusers copies on a stream."""
    if how == BLOCKS:
        return sum(buffer.nbytes for blocks in _direct_lists(module) for block in blocks for buffer in block.buffers())
    return sum(b.nbytes for part in module.modules() if isinstance(part, _LEAVES) for b in part.buffers())


class Host:
    """A pipeline, a device, and the offloading that the installed diffusers supports for them.

    modules: the pipeline's models by name, without torch.compile's wrappers.
    per_group: number of blocks loaded together.
    has_groups: whether the installed diffusers has group offloading.
    streams: whether weights can be copied on a stream of the device.

    Raises:
        ValueError: `stream` is True, and no stream can be used.
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
            raise ValueError(f"no stream can be used: {self.streams.reason}; use stream='auto'")

    def _streams(self, stream: bool | str) -> Streams:
        if not self.has_groups:
            return Streams(False, False, "the installed diffusers has no group offloading")
        if stream is False:
            return Streams(False, False, "not wanted")
        if self.per_group > 1:
            return Streams(
                False, False, "diffusers copies one block at a time on a stream, and blocks_per_group is larger"
            )
        return streams_on(self.device)

    def estimates(self, room: int | None) -> tuple[Estimate, ...]:
        """Returns the needs of each level; `room`, in bytes of weights, decides whether a decoder stays in place."""
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
        else:  # one component runs at a time, and its weights are moved away after it
            staying = sum(placement.peak for placement in placements if placement.how == DEVICE)
            kept = sum(_kept_buffers(self.modules[p.name], p.how) for p in placements if p.stream)
            peak = staying + kept + max((p.peak for p in placements if p.how != DEVICE), default=0)
        return Estimate(level, peak, self._obstacle(level), placements)

    def _peak_of_models(self, weights: Mapping[str, int]) -> int:
        """Returns the bytes of the largest model and of those that stay on the device beside it.

        A model is moved away when the next one in diffusers' sequence is loaded. A VAE that has encoded stays until it
        decodes; a model that is in no sequence stays until the end.
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
            return f"{type(self.pipe).__name__} defines no order of its models (`model_cpu_offload_seq`)"
        if level not in ("group", "leaf"):
            return ""
        packed = [name for name, module in self.modules.items() if is_quantized_by_bitsandbytes(module)]
        if packed:
            return f"bitsandbytes has quantised {', '.join(packed)}, so its weights cannot be moved separately"
        if level == "group" and not self.has_groups:
            return "the installed diffusers has no group offloading"
        return ""

    def _whole(self, name: str, module: nn.Module, how: str, why: str = "") -> Placement:
        size = _size(module)
        return Placement(name, type(module).__name__, how, False, size, size, 0, why)

    def _grouped(self, name: str, module: nn.Module, codecs_stay: bool) -> Placement:
        if _is_codec(module) and codecs_stay:
            return self._whole(name, module, DEVICE, "its layers would be copied again every few frames")
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
        if _is_codec(module):  # diffusers learns the order of layers from calls of `forward`
            why = "the pipeline does not call `forward`, from which diffusers learns the order" if stream else ""
            stream = False
        return Placement(
            name, type(module).__name__, LEAVES, stream, size,
            _peak_of_leaves(module, stream), size * (stream and not self.low_cpu_mem_usage), why,
        )  # fmt: skip


def _is_codec(module: nn.Module) -> bool:
    """Whether the pipeline calls `encode` and `decode` of a model, which bypass the hooks on its `forward`."""
    return callable(getattr(module, "decode", None))


# Choice of a level


def make_plan(host: Host, level: str, budget: int | None, reserve: int | None) -> OffloadPlan:
    """Chooses a level for a pipeline on a device.

    Args:
        host: the pipeline and the device.
        level: one of `LEVELS`, or "auto" for the first that fits.
        budget: bytes available on the device; None queries the device.
        reserve: bytes of the budget for activations; None is the fraction `RESERVED`.

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
            raise ValueError(f"no possible level can use a stream: {estimates[-1].obstacle}; use stream='auto'")
        chosen, reason = _choose(host, suitable, room)
    else:
        chosen = next(e for e in estimates if e.level == level)
        if chosen.obstacle and level == "group" and not host.has_groups:
            chosen, reason = estimates[-1], "the possible level closest to 'group'"
        elif chosen.obstacle:
            others = ", ".join(repr(e.level) for e in possible)
            raise ValueError(f"level {level!r} is not possible: {chosen.obstacle}; use {others}")
        else:
            reason = "requested"
        if room is not None and chosen.peak > room:
            smaller = [e.level for e in possible if e.peak <= room]
            reason += f"; it may not fit{', unlike ' + repr(smaller[0]) if smaller else ', nor does anything smaller'}"
    if chosen.level == "leaf" and not host.has_groups:
        reason += "; uses sequential offload, because the installed diffusers has no group offloading"
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
    """Returns the first level that fits, or otherwise the smallest, with the reason."""
    if room is None:
        chosen = next((e for e in possible if e.level == "group"), possible[-1])
        return chosen, "the free memory of the device is unknown: pass a `budget` to offload less, or more"
    fitting = next((e for e in possible if e.peak <= room), None)
    if fitting is not None:
        larger = ", ".join(f"{e.level!r}" for e in possible[: possible.index(fitting)])
        return fitting, f"the first level that fits; {larger} would not" if larger else "everything fits"
    smallest = min(possible, key=lambda estimate: estimate.peak)
    short = report.size(smallest.peak - room)
    return (
        smallest,
        f"the smallest possible level, still {short} too large: pass a smaller `reserve`, or use another device",
    )
