"""`parallelize_vae`: validates the arguments and chooses between tiles and slabs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from wan_patches.vae_parallel.model import is_wan_vae
from wan_patches.vae_parallel.ranks import Ranks
from wan_patches.vae_parallel.slabs import share_slabs
from wan_patches.vae_parallel.tiles import share_tiles

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MODES", "ParallelVAE", "parallelize_vae"]

MODES = ("tiles", "spatial")


class ParallelVAE:
    """A VAE that is parallel until `restore`, or for the length of a `with` block.

    undo: functions that restore the VAE, to be called in reverse order.
    """

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def restore(self) -> None:
        """Restores the VAE. Call it in every rank, between two calls of the VAE."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def parallelize_vae(vae: Any, group: dist.ProcessGroup | None = None, mode: str = "tiles") -> ParallelVAE:
    """Distributes the work of `vae.encode` and `vae.decode` over the ranks of a group.

    Call it in every rank, for a VAE with the same weights. Afterwards all ranks must call `encode` and `decode`
    together, with the same arguments. Every rank gets the whole result, because pipelines continue with the decoded
    frames and the encoded conditions. If autograd records the call, every rank computes everything, as in stock.

    Args:
        vae: an `AutoencoderKLWan`, on the device of this rank.
        group: a process group with a backend for that device; None for all ranks.
        mode: "tiles" enables tiling with the VAE's tile sizes; results are bit-identical to stock with tiling, for any
            number of ranks. Every rank computes a video no larger than a tile whole, as in stock. "spatial" follows
            stock without tiling: only rounding differs, because convolutions of slabs may use other algorithms (mean
            errors against float64 were 0.93 to 1.09 times stock's own). It splits the height or the width of the
            latents, whichever splits more evenly.

    Returns:
        The parallel VAE; its `restore` reverts the change.

    Raises:
        ValueError: another model, an unknown mode, a VAE that is already parallel, or for "spatial" a VAE with tiling
            enabled. Later, in "spatial", `encode` and `decode` raise it if latents have fewer rows and columns than
            there are ranks.
        RuntimeError: torch.distributed is not initialised, or the installed diffusers' code is not known. Later, in
            "tiles", `encode` and `decode` raise it if another rank failed. In "spatial" the other ranks wait for a
            failed rank until the group's timeout.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if not is_wan_vae(vae):
        raise ValueError(f"{type(vae).__name__} cannot be made parallel; AutoencoderKLWan can")
    if hasattr(type(vae), "_wan_patches_parallel"):
        raise ValueError(f"this {type(vae).__name__} is already parallel")
    share = share_tiles if mode == "tiles" else share_slabs
    return ParallelVAE(share(vae, Ranks(group)))
