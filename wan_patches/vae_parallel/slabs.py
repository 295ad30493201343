"""Wan's VAE on several devices: every rank of a process group encodes or decodes a part of each video.

    parallel = parallelize_vae(pipe.vae)  # in every rank
    video = pipe(...)  # the same call, with the same arguments, in every rank
    parallel.restore()

    tiles     stock's tiles are spread over the ranks, exchanged, and blended in every rank: EXACT, the bits of stock
              with `vae.enable_tiling()`
    spatial   each rank has a slab of the picture, and convolutions get the rows next to it from the neighbours:
              CLOSE to stock without tiling, since a convolution of a part rounds in another order

The model is the installed one: its own modules and methods run, in an order that is stock's.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from wan_patches.patching.fingerprints import AUTOENCODER, is_known
from wan_patches.patching.objects import exchange_class

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MODES", "ParallelVAE", "balanced", "parallelize_vae"]

MODES = ("tiles", "spatial")

_MODEL = "AutoencoderKLWan"

#: By tiled method: the two modules that a tile goes through, a few frames at a time.
_TILED = {"tiled_decode": ("post_quant_conv", "decoder"), "tiled_encode": ("encoder", "quant_conv")}

#: By untiled method: the part of the model whose convolutions look at neighbours.
_UNTILED = {"_decode": "decoder", "_encode": "encoder"}

#: Of what encoder and decoder are made: classes whose `forward` has to be known.
_PARTS = (
    *("AvgDown3D", "DupUp3D", "WanAttentionBlock", "WanCausalConv3d", "WanDecoder3d", "WanEncoder3d", "WanMidBlock"),
    *("WanRMS_norm", "WanResample", "WanResidualBlock", "WanResidualDownBlock", "WanResidualUpBlock", "WanUpBlock"),
    "WanUpsample",
)
_ACTIVATIONS = (nn.GELU, nn.Mish, nn.ReLU, nn.SiLU)
_OF_TORCH = (nn.Conv2d, nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential, nn.ZeroPad2d, *_ACTIVATIONS)

#: Convolutions by spatial kernel, stride and padding.
_POINTWISE = ((1, 1), (1, 1), (0, 0, 0, 0))
_SAME = ((3, 3), (1, 1), (1, 1, 1, 1))
_HALVING = ((3, 3), (2, 2), (0, 0, 0, 0))  # after a padding at the end


class ParallelVAE:
    """A VAE that is parallel until `restore`, or for the length of a `with` block."""

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def restore(self) -> None:
        """Makes the VAE again what it was; in every rank, between two calls."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def parallelize_vae(vae: Any, group: dist.ProcessGroup | None = None, mode: str = "tiles") -> ParallelVAE:
    """Has the ranks of a group share the work of `vae.encode` and `vae.decode`.

    Called in every rank, for a VAE with the same weights. From then on all ranks call `encode` and `decode` together,
    with the same arguments, and all get the whole result: pipelines use decoded frames and encoded conditions further.
    Where autograd records, every rank computes everything, as stock does.

    Args:
        vae: an `AutoencoderKLWan`, on the device of this rank.
        group: whose backend knows that device; None for all ranks.
        mode: "tiles" turns tiling on, with the sizes that the VAE has; results have the bits of stock with tiling, for
            any number of ranks. What is no larger than a tile is computed whole by every rank, as stock does not divide
            it. "spatial" follows stock without tiling: only rounding differs, as convolutions of parts may take other
            algorithms (mean errors against float64 were 0.93 to 1.09 times stock's own). It divides the height or the
            width of the latents, whichever divides better.

    Returns:
        What undoes it.

    Raises:
        ValueError: for another model, an unknown mode, or a VAE that is parallel already or, for "spatial", has tiling
            turned on. Later, in "spatial", `encode` and `decode` raise it for fewer rows and columns of latents than
            ranks.
        RuntimeError: torch.distributed is not initialised, or the installed diffusers computes in a way that is not
            known here. Later, `encode` and `decode` raise it in "tiles" where another rank failed. In "spatial" the
            others wait for a rank that failed, for as long as the group does.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if not is_wan_vae(vae):
        raise ValueError(f"{type(vae).__name__} cannot be made parallel; AutoencoderKLWan can")
    if hasattr(type(vae), "_wan_patches_parallel"):
        raise ValueError(f"this {type(vae).__name__} is parallel already")
    ranks = _Ranks(group)
    return _by_tiles(vae, ranks) if mode == "tiles" else _by_slabs(vae, ranks)


def is_wan_vae(vae: object) -> bool:
    """Whether it can be made parallel."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        return False
    return isinstance(vae, AutoencoderKLWan)


class _Ranks:
    """The processes that share the work. Compilers stop where they exchange something."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("a parallel VAE needs torch.distributed: call init_process_group in every rank")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @torch.compiler.disable
    def tell(self, value: Any) -> list[Any]:
        """The values of all ranks; small ones."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @torch.compiler.disable
    def fill(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor of rank `source`, in all ranks; elsewhere `tensor` is filled with it."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, self._global(source), group=self.group)
        return tensor

    @torch.compiler.disable
    def edges(
        self, first: torch.Tensor, last: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The `last` of the rank before and the `first` of the rank after; None at the ends, and without `last`."""
        above = below = None
        todo = []
        for neighbour, sent in ((self.rank - 1, first), (self.rank + 1, last)):
            if not 0 <= neighbour < self.size:
                continue
            if sent is not None:
                todo.append(self._operation(dist.isend, sent.contiguous(), neighbour))
            if neighbour > self.rank:
                below = torch.empty_like(first, memory_format=torch.contiguous_format)
                todo.append(self._operation(dist.irecv, below, neighbour))
            elif last is not None:
                above = torch.empty_like(last, memory_format=torch.contiguous_format)
                todo.append(self._operation(dist.irecv, above, neighbour))
        for work in dist.batch_isend_irecv(todo) if todo else ():
            work.wait()
        return above, below

    def _operation(self, kind: Callable[..., Any], tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, self._global(peer), self.group)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _require_known(cls: type, method: str, name: str) -> None:
    """name: that of the class, whose `method` has to say what it is known to say; or of the one it is made of."""
    if is_known(getattr(cls, method, None), AUTOENCODER, f"{name}.{method}"):
        return
    raise RuntimeError(
        f"{cls.__name__}.{method}, as it is installed or as something has changed it, is not known here, so the VAE "
        "cannot be made parallel"
    )


def _is_recorded(vae: nn.Module, x: torch.Tensor) -> bool:
    """Whether autograd follows the computation; it cannot follow it to other ranks."""
    return torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in vae.parameters()))


# Tiles


def _by_tiles(vae: Any, ranks: _Ranks) -> ParallelVAE:
    cls = type(vae)
    for method in _TILED:
        _require_known(cls, method, _MODEL)
    tiled = vae.use_tiling

    def give_tiling_back() -> None:
        vae.use_tiling = tiled

    vae.enable_tiling()
    members = {method: _divided_tiles(getattr(cls, method), names, ranks) for method, names in _TILED.items()}
    return ParallelVAE([give_tiling_back, exchange_class(vae, {**members, "_wan_patches_parallel": True})])


def _divided_tiles(method: Callable[..., Any], names: tuple[str, str], ranks: _Ranks) -> Callable[..., Any]:
    """`method` of which each rank computes some tiles.

    It runs three times: to see which tiles there are, to compute those of this rank, and, when all ranks have all, to
    put them together. The first two times, what is not to be computed is empty, which makes all else empty too.
    """

    @functools.wraps(method)
    def call(vae: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_recorded(vae, x):
            return method(vae, x, *args, **kwargs)

        def run(enter: Callable[..., torch.Tensor], leave: Callable[..., torch.Tensor]) -> Any:
            return method(_Conducted(vae, dict(zip(names, (enter, leave)))), x, *args, **kwargs)

        vae.clear_cache()  # stock reads what it sets
        nothing = x[:, :, :1, :0, :0]
        sizes = _sizes(run, nothing)
        owners = balanced(sizes, ranks.size)
        mine = {tile for tile, owner in owners.items() if owner == ranks.rank}
        tiles = _exchanged(owners, lambda: _computed(vae, names, run, mine, nothing), ranks, x.device)

        def all_at_once(tile: int, *_: Any, **__: Any) -> torch.Tensor:
            whole = tiles[tile]
            tiles[tile] = whole.new_empty((*whole.shape[:2], 0, *whole.shape[3:]))  # what follows the first frames
            return whole

        return run(lambda *_, **__: nothing, all_at_once)

    return call


class _Conducted:
    """The VAE as a tiled method sees it: other functions, which get the number of the tile, for some modules."""

    def __init__(self, vae: Any, functions: Mapping[str, Callable[..., torch.Tensor]]) -> None:
        self._wan_patches_vae, self._wan_patches_tile = vae, -1
        for name, function in functions.items():
            setattr(self, name, functools.partial(self._wan_patches_call, function))

    def _wan_patches_call(self, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(self._wan_patches_tile, *args, **kwargs)

    def clear_cache(self) -> None:  # before each tile, and at the end
        self._wan_patches_tile += 1
        self._wan_patches_vae.clear_cache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wan_patches_vae, name)


def _sizes(run: Callable[..., Any], nothing: torch.Tensor) -> dict[int, int]:
    """How many numbers go into each tile."""
    sizes: dict[int, int] = defaultdict(int)

    def enter(tile: int, part: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        sizes[tile] += part.numel()
        return nothing

    run(enter, lambda *_, **__: nothing)
    return sizes


def _computed(
    vae: Any, names: tuple[str, str], run: Callable[..., Any], mine: Collection[int], nothing: torch.Tensor
) -> dict[int, torch.Tensor]:
    """The tiles of this rank."""
    first, second = (getattr(vae, name) for name in names)
    made: dict[int, list[torch.Tensor]] = defaultdict(list)

    def enter(tile: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return first(*args, **kwargs) if tile in mine else nothing

    def leave(tile: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tile in mine:
            made[tile].append(second(*args, **kwargs))
        return nothing

    run(enter, leave)
    return {tile: torch.cat(made.pop(tile), dim=2) for tile in mine}


def _exchanged(
    owners: Mapping[int, int], compute: Callable[[], dict[int, torch.Tensor]], ranks: _Ranks, device: torch.device
) -> dict[int, torch.Tensor]:
    """All tiles, in every rank. Raises in every rank where one cannot compute its own."""
    tiles: dict[int, torch.Tensor] = {}
    error: Exception | None = None
    try:
        tiles = compute()
    except Exception as problem:
        error = problem
    shapes = {tile: (tuple(part.shape), part.dtype) for tile, part in tiles.items()}
    told = ranks.tell(shapes if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed := [rank for rank, said in enumerate(told) if isinstance(said, str)]:
        raise RuntimeError(f"rank {failed[0]} of a parallel VAE failed with {told[failed[0]]}")
    for tile, owner in owners.items():
        if owner != ranks.rank:
            shape, dtype = told[owner][tile]
            tiles[tile] = torch.empty(shape, dtype=dtype, device=device)
        tiles[tile] = ranks.fill(tiles[tile], owner)
    return tiles


def balanced(sizes: Mapping[int, int], ranks: int) -> dict[int, int]:
    """The rank of each tile: the largest are given away first, each to the rank that has the least so far.

    Args:
        sizes: of each tile, what its computation takes, in any unit.
        ranks: how many there are.
    """
    loads, owners = [0] * ranks, {}
    for tile in sorted(sizes, key=lambda tile: (-sizes[tile], tile)):
        owners[tile] = loads.index(min(loads))
        loads[owners[tile]] += sizes[tile]
    return owners


# Slabs


def _by_slabs(vae: Any, ranks: _Ranks) -> ParallelVAE:
    cls = type(vae)
    if vae.use_tiling:
        raise ValueError('"spatial" follows the VAE without tiling: call disable_tiling() first, or use "tiles"')
    slabs = _Slabs(ranks)
    exchanges: list[tuple[Any, dict[str, Any]]] = []
    members: dict[str, Any] = {"_wan_patches_parallel": True}
    pixels = 2 ** len(vae.temperal_downsample) * (getattr(vae.config, "patch_size", None) or 1)
    for method, part in _UNTILED.items():
        _require_known(cls, method, _MODEL)
        unit = pixels if method == "_encode" else 1
        members[method] = _divided_slabs(getattr(cls, method), part, unit, slabs)
        exchanges += _neighbourly(getattr(vae, part), slabs)
    return ParallelVAE([exchange_class(instance, added) for instance, added in [*exchanges, (vae, members)]])


class _Slabs:
    """How what is computed at the moment is divided, by rows or by columns; not at all while `axis` is 0."""

    def __init__(self, ranks: _Ranks) -> None:
        self.ranks = ranks
        self.axis = 0
        self.sizes: list[int] = []  # in latents
        self.asked: set[int] = set()  # the modules that have been given their neighbours

    @contextmanager
    def of(self, x: torch.Tensor, unit: int) -> Iterator[torch.Tensor]:
        """Gives the slab of this rank; `unit` rows or columns of `x` become one of the latents, and stay together."""
        ranks = self.ranks.size
        shares = {axis: _shares(x.shape[axis] // unit, ranks) for axis in (-2, -1)}
        possible = [axis for axis, sizes in shares.items() if all(sizes)]
        if not possible:
            raise ValueError(
                f"{ranks} ranks cannot share {sum(shares[-2])} rows or {sum(shares[-1])} columns of latents by "
                '"spatial"; use "tiles"'
            )
        axis = min(possible, key=lambda axis: shares[axis][0] / sum(shares[axis]))  # what the slowest rank computes
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
        """The slabs of all ranks, put together."""
        scale = slab.shape[self.axis] // self.sizes[self.ranks.rank]
        parts = []
        for rank, size in enumerate(self.sizes):
            shape = list(slab.shape)
            shape[self.axis] = size * scale
            mine = rank == self.ranks.rank
            parts.append(self.ranks.fill(slab if mine else slab.new_empty(shape), rank))
        return torch.cat(parts, self.axis)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """Of what has the size of the latents, the slab of this rank."""
        rank = self.ranks.rank
        return whole.narrow(self.axis, sum(self.sizes[:rank]), self.sizes[rank])


def _shares(total: int, ranks: int) -> list[int]:
    """`total` in parts that differ by one at most, the larger ones first."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def _divided_slabs(method: Callable[..., Any], part: str, unit: int, slabs: _Slabs) -> Callable[..., Any]:
    """`method` of which each rank computes a slab."""

    @functools.wraps(method)
    def call(vae: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        odd = unit > 1 and vae.config.get("is_residual", False) and (x.shape[-2] % unit or x.shape[-1] % unit)
        if odd or _is_recorded(vae, x):  # stock refuses sizes that it cannot halve: in all ranks, not in the last only
            return method(vae, x, *args, **kwargs)
        if vae.use_tiling:
            raise RuntimeError('"spatial" follows the VAE without tiling, which has been turned on: disable_tiling()')
        with slabs.of(x, unit) as slab:
            result = method(vae, slab, *args, **kwargs)
            whole = slabs.whole(result if isinstance(result, torch.Tensor) else result[0])
        modules = getattr(vae, part).modules()
        if any(hasattr(type(module), "_wan_patches_slabs") and id(module) not in slabs.asked for module in modules):
            raise RuntimeError(f"something computes convolutions of the VAE's {part} without calling them as modules")
        if isinstance(result, torch.Tensor):
            return whole
        return (whole,) if isinstance(result, tuple) else type(result)(sample=whole)

    return call


def _neighbourly(part: nn.Module, slabs: _Slabs) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules of an encoder or decoder that look beyond a slab, and how each is called with what lies there."""
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
            _require_known(cls, "forward", cls.__name__)
        elif cls not in _OF_TORCH:
            raise RuntimeError(f"{cls.__name__} in the VAE is not known here, so it cannot be divided into slabs")
        call: Callable[..., Any] | None = None
        if cls.__name__ == "WanAttentionBlock":
            call = _with_all
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            form = _form(module)
            if form == _SAME:
                call = _with_edges
            elif form != _POINTWISE and not (form == _HALVING and id(module) in padded):
                raise RuntimeError(f"a convolution in the VAE is not known here: {module}")
        elif isinstance(module, nn.ZeroPad2d):
            if tuple(module.padding) != (0, 1, 0, 1):
                raise RuntimeError(f"a padding in the VAE is not known here: {module}")
            call = _with_what_follows
        if call is not None:
            members = {"__call__": _while_divided(call, cls, slabs), "_wan_patches_slabs": True}
            found.append((module, members))
    return found


def _form(conv: Any) -> tuple[Any, ...]:
    # the causal convolution pads by itself, given as for `F.pad`
    padding = tuple(conv._padding[:4]) if hasattr(conv, "_padding") else (*conv.padding, *conv.padding)
    return tuple(conv.kernel_size[-2:]), tuple(conv.stride[-2:]), padding


def _while_divided(call: Callable[..., Any], cls: type[nn.Module], slabs: _Slabs) -> Callable[..., Any]:
    """`__call__` and not `forward`: hooks of others see what the module is given."""

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not slabs.axis:
            return cls.__call__(module, *args, **kwargs)
        slabs.asked.add(id(module))
        return call(functools.partial(cls.__call__, module), slabs, *args, **kwargs)

    return called


def _with_edges(
    compute: Callable[..., torch.Tensor], slabs: _Slabs, x: torch.Tensor, cache_x: torch.Tensor | None = None
) -> torch.Tensor:
    """A convolution that keeps the size: the slab gets the rows next to it, and what comes of those is left out."""
    axis = slabs.axis
    size = x.shape[axis]
    parts = [x] if cache_x is None else [x, cache_x]  # earlier frames, kept without those rows
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
    """What `_joined` was made of, by the frames of `parts`."""
    if joined is None or len(parts) == 1:
        return [joined] * len(parts)
    return joined.split([part.shape[2] for part in parts], dim=2)


def _with_what_follows(compute: Callable[..., torch.Tensor], slabs: _Slabs, x: torch.Tensor) -> torch.Tensor:
    """A padding by one at the end: with the next slab's first row instead of zeros."""
    padded = compute(x)
    _, below = slabs.ranks.edges(x.narrow(slabs.axis, 0, 1))
    if below is not None:
        across = -3 - slabs.axis
        end = padded.narrow(slabs.axis, x.shape[slabs.axis], 1).narrow(across, 0, x.shape[across])
        end.copy_(below)
    return padded


def _with_all(compute: Callable[..., torch.Tensor], slabs: _Slabs, x: torch.Tensor) -> torch.Tensor:
    """Attention, which looks everywhere: in every rank for the whole picture, which is small where it is."""
    return slabs.own(compute(slabs.whole(x)))
