"""Slabs: each rank computes some of the rows or columns, and convolutions get the adjacent ones from the neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from wan_patches.patching.objects import exchange_class
from wan_patches.vae_parallel.model import MODEL, is_recorded, require_known
from wan_patches.vae_parallel.ranks import Ranks

__all__ = ["share_slabs"]

#: For each untiled method, the part of the model whose convolutions need the neighbours' edges.
_UNTILED = {"_decode": "decoder", "_encode": "encoder"}

#: The classes of modules in encoder and decoder; their `forward` must have a known text.
_PARTS = (
    *("AvgDown3D", "DupUp3D", "WanAttentionBlock", "WanCausalConv3d", "WanDecoder3d", "WanEncoder3d", "WanMidBlock"),
    *("WanRMS_norm", "WanResample", "WanResidualBlock", "WanResidualDownBlock", "WanResidualUpBlock", "WanUpBlock"),
    "WanUpsample",
)
_ACTIVATIONS = (nn.GELU, nn.Mish, nn.ReLU, nn.SiLU)
_OF_TORCH = (nn.Conv2d, nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential, nn.ZeroPad2d, *_ACTIVATIONS)

#: Spatial kernel, stride and padding of the known convolutions.
_POINTWISE = ((1, 1), (1, 1), (0, 0, 0, 0))
_SAME = ((3, 3), (1, 1), (1, 1, 1, 1))
_HALVING = ((3, 3), (2, 2), (0, 0, 0, 0))  # preceded by padding at the end


def share_slabs(vae: Any, ranks: Ranks) -> list[Callable[[], None]]:
    """Makes each rank compute a slab of the image in a VAE; returns the functions that revert this.

    Raises:
        ValueError: the VAE has tiling enabled.
        RuntimeError: code or a module of the VAE is not known.
    """
    cls = type(vae)
    if vae.use_tiling:
        raise ValueError('"spatial" requires tiling to be off: call disable_tiling() first, or use "tiles"')
    slabs = _Slabs(ranks)
    exchanges: list[tuple[Any, dict[str, Any]]] = []
    members: dict[str, Any] = {"_wan_patches_parallel": True}
    pixels = 2 ** len(vae.temperal_downsample) * (getattr(vae.config, "patch_size", None) or 1)
    for method, part in _UNTILED.items():
        require_known(cls, method, MODEL)
        unit = pixels if method == "_encode" else 1
        members[method] = _divided_slabs(getattr(cls, method), part, unit, slabs)
        exchanges += _neighbourly(getattr(vae, part), slabs)
    return [exchange_class(instance, added) for instance, added in [*exchanges, (vae, members)]]


class _Slabs:
    """How the current computation is divided: along rows or columns (`axis`), or not at all if `axis` is 0."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.axis = 0
        self.sizes: list[int] = []  # in latents
        self.asked: set[int] = set()  # ids of the modules that have exchanged edges

    @contextmanager
    def of(self, x: torch.Tensor, unit: int) -> Iterator[torch.Tensor]:
        """Yields this rank's slab of `x`; never splits the `unit` rows or columns that belong to one of the latents."""
        ranks = self.ranks.size
        shares = {axis: _shares(x.shape[axis] // unit, ranks) for axis in (-2, -1)}
        possible = [axis for axis, sizes in shares.items() if all(sizes)]
        if not possible:
            raise ValueError(
                f"{ranks} ranks cannot share {sum(shares[-2])} rows or {sum(shares[-1])} columns of latents by "
                '"spatial"; use mode="tiles"'
            )
        axis = min(possible, key=lambda axis: shares[axis][0] / sum(shares[axis]))  # the slowest rank's share
        sizes = shares[axis]
        start = sum(sizes[: self.ranks.rank]) * unit
        last = self.ranks.rank == ranks - 1
        end = x.shape[axis] if last else start + sizes[self.ranks.rank] * unit
        self.axis, self.sizes = axis, sizes
        self.asked.clear()
        try:
            yield x.narrow(axis, start, end - start)
        finally:
            self.axis = 0

    def whole(self, slab: torch.Tensor) -> torch.Tensor:
        """Joins the slabs of all ranks."""
        scale = slab.shape[self.axis] // self.sizes[self.ranks.rank]
        parts = []
        for rank, size in enumerate(self.sizes):
            shape = list(slab.shape)
            shape[self.axis] = size * scale
            mine = rank == self.ranks.rank
            parts.append(self.ranks.fill(slab if mine else slab.new_empty(shape), rank))
        return torch.cat(parts, self.axis)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """Returns this rank's slab of a tensor that has the size of the latents."""
        rank = self.ranks.rank
        return whole.narrow(self.axis, sum(self.sizes[:rank]), self.sizes[rank])


def _shares(total: int, ranks: int) -> list[int]:
    """Divides `total` into parts that differ by at most one, larger parts first."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def _divided_slabs(method: Callable[..., Any], part: str, unit: int, slabs: _Slabs) -> Callable[..., Any]:
    """Returns an untiled method in which each rank computes one slab."""

    @functools.wraps(method)
    def call(vae: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        odd = unit > 1 and vae.config.get("is_residual", False) and (x.shape[-2] % unit or x.shape[-1] % unit)
        if odd or is_recorded(vae, x):  # stock rejects sizes that it cannot halve; every rank must raise
            return method(vae, x, *args, **kwargs)
        if vae.use_tiling:
            raise RuntimeError('"spatial" requires tiling to be off, but it was turned on since: call disable_tiling()')
        with slabs.of(x, unit) as slab:
            result = method(vae, slab, *args, **kwargs)
            whole = slabs.whole(result if isinstance(result, torch.Tensor) else result[0])
        modules = getattr(vae, part).modules()
        if any(hasattr(type(module), "_wan_patches_slabs") and id(module) not in slabs.asked for module in modules):
            raise RuntimeError(f"convolutions of the VAE's {part} were computed without calling them as modules")
        if isinstance(result, torch.Tensor):
            return whole
        return (whole,) if isinstance(result, tuple) else type(result)(sample=whole)

    return call


def _neighbourly(part: nn.Module, slabs: _Slabs) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Returns the modules of an encoder or decoder that need edges, with the members that exchange them."""
    found = []
    padded = {
        id(conv)
        for module in part.modules()
        if isinstance(module, nn.Sequential)
        for pad, conv in pairwise(module)
        if isinstance(pad, nn.ZeroPad2d)
    }
    for module in part.modules():
        cls = type(module)
        if cls.__name__ in _PARTS:
            require_known(cls, "forward", cls.__name__)
        elif cls not in _OF_TORCH:
            raise RuntimeError(f"{cls.__name__} in the VAE is not a known class, so it cannot be divided into slabs")
        call: Callable[..., Any] | None = None
        if cls.__name__ == "WanAttentionBlock":
            call = _with_all
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            form = _form(module)
            if form == _SAME:
                call = _with_edges
            elif form != _POINTWISE and not (form == _HALVING and id(module) in padded):
                raise RuntimeError(f"the VAE contains an unknown convolution: {module}")
        elif isinstance(module, nn.ZeroPad2d):
            if tuple(module.padding) != (0, 1, 0, 1):
                raise RuntimeError(f"the VAE contains an unknown padding: {module}")
            call = _with_what_follows
        if call is not None:
            members = {"__call__": _while_divided(call, cls, slabs), "_wan_patches_slabs": True}
            found.append((module, members))
    return found


def _form(conv: Any) -> tuple[Any, ...]:
    # the causal convolution pads its input itself; the amounts are in the order of `F.pad`
    padding = tuple(conv._padding[:4]) if hasattr(conv, "_padding") else (*conv.padding, *conv.padding)
    return tuple(conv.kernel_size[-2:]), tuple(conv.stride[-2:]), padding


def _while_divided(call: Callable[..., Any], cls: type[nn.Module], slabs: _Slabs) -> Callable[..., Any]:
    """Returns a `__call__`; not a `forward`, so that other hooks see the module's own arguments."""

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not slabs.axis:
            return cls.__call__(module, *args, **kwargs)
        slabs.asked.add(id(module))
        return call(functools.partial(cls.__call__, module), slabs, *args, **kwargs)

    return called


def _with_edges(
    compute: Callable[..., torch.Tensor], slabs: _Slabs, x: torch.Tensor, cache_x: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes a size-preserving convolution with the adjacent rows, and drops the results of those rows."""
    axis = slabs.axis
    size = x.shape[axis]
    parts = [x] if cache_x is None else [x, cache_x]  # earlier frames, stored without the adjacent rows
    first, last = (_joined([part.narrow(axis, at, 1) for part in parts]) for at in (0, size - 1))
    above, below = slabs.ranks.edges(first, last)
    extended = [
        torch.cat([piece for piece in pieces if piece is not None], axis)
        for pieces in zip(_parted(above, parts), parts, _parted(below, parts))
    ]
    return compute(*extended).narrow(axis, int(above is not None), size)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _parted(joined: torch.Tensor | None, parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    """Splits the result of `_joined` by the frames of `parts`."""
    if joined is None or len(parts) == 1:
        return [joined] * len(parts)
    return joined.split([part.shape[2] for part in parts], dim=2)


def _with_what_follows(compute: Callable[..., torch.Tensor], slabs: _Slabs, x: torch.Tensor) -> torch.Tensor:
    """Pads by one at the end, with the first row of the next slab instead of zeros."""
    padded = compute(x)
    _, below = slabs.ranks.edges(x.narrow(slabs.axis, 0, 1))
    if below is not None:
        across = -3 - slabs.axis
        end = padded.narrow(slabs.axis, x.shape[slabs.axis], 1).narrow(across, 0, x.shape[across])
        end.copy_(below)
    return padded


def _with_all(compute: Callable[..., torch.Tensor], slabs: _Slabs, x: torch.Tensor) -> torch.Tensor:
    """Computes attention of the whole image in every rank: it needs all positions, and is small at that depth."""
    return slabs.own(compute(slabs.whole(x)))
