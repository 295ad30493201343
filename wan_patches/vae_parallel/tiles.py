"""Tiles: stock's tiles are distributed over the ranks, exchanged, and blended in every rank."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from wan_patches.patching.objects import exchange_class
from wan_patches.vae_parallel.model import MODEL, is_recorded, require_known
from wan_patches.vae_parallel.ranks import Ranks

__all__ = ["balanced", "share_tiles"]

#: For each tiled method, the two modules that process a tile, a few frames at a time.
_TILED = {"tiled_decode": ("post_quant_conv", "decoder"), "tiled_encode": ("encoder", "quant_conv")}


def share_tiles(vae: Any, ranks: Ranks) -> list[Callable[[], None]]:
    """Enables tiling in a VAE and makes each rank compute some of the tiles; returns the functions that revert this.

    Raises:
        RuntimeError: a tiled method of the VAE is not known.
    """
    cls = type(vae)
    for method in _TILED:
        require_known(cls, method, MODEL)
    tiled = vae.use_tiling

    def give_tiling_back() -> None:
        vae.use_tiling = tiled

    vae.enable_tiling()
    members = {method: _divided_tiles(getattr(cls, method), names, ranks) for method, names in _TILED.items()}
    return [give_tiling_back, exchange_class(vae, {**members, "_wan_patches_parallel": True})]


def _divided_tiles(method: Callable[..., Any], names: tuple[str, str], ranks: Ranks) -> Callable[..., Any]:
    """Returns a tiled method in which each rank computes some of the tiles.

    The method runs three times: to enumerate the tiles, to compute those of this rank, and, once all ranks have all
    tiles, to join them. In the first two passes, everything else is computed on empty tensors.
    """

    @functools.wraps(method)
    def call(vae: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_recorded(vae, x):
            return method(vae, x, *args, **kwargs)

        def run(enter: Callable[..., torch.Tensor], leave: Callable[..., torch.Tensor]) -> Any:
            return method(_Conducted(vae, dict(zip(names, (enter, leave)))), x, *args, **kwargs)

        vae.clear_cache()  # sets the attributes that stock reads
        nothing = x[:, :, :1, :0, :0]
        sizes = _sizes(run, nothing)
        owners = balanced(sizes, ranks.size)
        mine = {tile for tile, owner in owners.items() if owner == ranks.rank}
        tiles = _exchanged(owners, lambda: _computed(vae, names, run, mine, nothing), ranks, x.device)

        def all_at_once(tile: int, *_: Any, **__: Any) -> torch.Tensor:
            whole = tiles[tile]
            tiles[tile] = whole.new_empty((*whole.shape[:2], 0, *whole.shape[3:]))  # for all calls after the first
            return whole

        return run(lambda *_, **__: nothing, all_at_once)

    return call


class _Conducted:
    """The VAE as a tiled method sees it: some modules are functions that also get the number of the tile."""

    def __init__(self, vae: Any, functions: Mapping[str, Callable[..., torch.Tensor]]) -> None:
        self._wan_patches_vae, self._wan_patches_tile = vae, -1
        for name, function in functions.items():
            setattr(self, name, functools.partial(self._wan_patches_call, function))

    def _wan_patches_call(self, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(self._wan_patches_tile, *args, **kwargs)

    def clear_cache(self) -> None:  # called before each tile and at the end
        self._wan_patches_tile += 1
        self._wan_patches_vae.clear_cache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wan_patches_vae, name)


def _sizes(run: Callable[..., Any], nothing: torch.Tensor) -> dict[int, int]:
    """Returns the number of elements that each tile reads."""
    sizes: dict[int, int] = defaultdict(int)

    def enter(tile: int, part: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        sizes[tile] += part.numel()
        return nothing

    run(enter, lambda *_, **__: nothing)
    return sizes


def _computed(
    vae: Any, names: tuple[str, str], run: Callable[..., Any], mine: Collection[int], nothing: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Returns the tiles of this rank."""
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
    owners: Mapping[int, int], compute: Callable[[], dict[int, torch.Tensor]], ranks: Ranks, device: torch.device
) -> dict[int, torch.Tensor]:
    """Returns all tiles in every rank; raises in every rank if any rank cannot compute its tiles."""
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
    """Assigns tiles to ranks: largest first, each to the rank with the smallest total so far.

    Args:
        sizes: the cost of each tile, in any unit.
        ranks: number of ranks.
    """
    loads, owners = [0] * ranks, {}
    for tile in sorted(sizes, key=lambda tile: (-sizes[tile], tile)):
        owners[tile] = loads.index(min(loads))
        loads[owners[tile]] += sizes[tile]
    return owners
