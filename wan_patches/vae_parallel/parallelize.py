"""`parallelize_vae`: checks, and the choice between tiles and slabs."""

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

    undo: functions that make it what it was, the last to be called first.
    """

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def restore(self) -> None:
        """Makes the VAE what it was before; to be called in every rank, between two calls of the VAE."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def parallelize_vae(vae: Any, group: dist.ProcessGroup | None = None, mode: str = "tiles") -> ParallelVAE:
    """Has the ranks of a group share the work of `vae.encode` and `vae.decode`.

    To be called in every rank, for a VAE with the same weights. From then on all ranks call `encode` and `decode`
    together, with the same arguments, and all get the whole result, since pipelines go on with decoded frames and
    encoded conditions. Where autograd records, every rank computes everything, as stock does.

    Args:
        vae: an `AutoencoderKLWan`, on the device of this rank.
        group: a process group with a backend for that device; None for all ranks.
        mode: "tiles" turns tiling on, with the VAE's tile sizes; results have the bits of stock with tiling, for any
            number of ranks. Every rank computes a video no larger than a tile whole, as stock does. "spatial" follows
            stock without tiling: only rounding differs, as convolutions of parts may take other algorithms (mean
            errors against float64 were 0.93 to 1.09 times stock's own). It divides the height or the width of the
            latents, whichever divides better.

    Returns:
        The parallel VAE, whose `restore` undoes it.

    Raises:
        ValueError: for another model, an unknown mode, or a VAE that is parallel already or, for "spatial", has tiling
            turned on. Later, in "spatial", `encode` and `decode` raise it for fewer rows and columns of latents than
            ranks.
        RuntimeError: torch.distributed is not initialised, or the code of the installed diffusers is not known here.
            Later, in "tiles", `encode` and `decode` raise it if another rank failed. In "spatial" the other ranks wait
            for a rank that failed until the group's timeout.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if not is_wan_vae(vae):
        raise ValueError(f"{type(vae).__name__} cannot be made parallel; AutoencoderKLWan can")
    if hasattr(type(vae), "_wan_patches_parallel"):
        raise ValueError(f"this {type(vae).__name__} is parallel already")
    share = share_tiles if mode == "tiles" else share_slabs
    return ParallelVAE(share(vae, Ranks(group)))
