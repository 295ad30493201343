"""Wan's VAE on several devices: every rank of a process group encodes or decodes a part of each video.

    parallel = parallelize_vae(pipe.vae)  # in every rank
    video = pipe(...)  # the same call, with the same arguments, in every rank
    parallel.restore()

    tiles     stock's tiles are spread over the ranks, exchanged, and blended in every rank: EXACT, the bits of stock
              with `vae.enable_tiling()`
    spatial   each rank has a slab of the picture, and convolutions get the rows next to it from the neighbours:
              CLOSE to stock without tiling, since a convolution of a part rounds in another order

The model is the installed one: its own modules and methods run, in stock's order.
"""

from __future__ import annotations

from wan_patches.vae_parallel.model import is_wan_vae
from wan_patches.vae_parallel.parallelize import MODES, ParallelVAE, parallelize_vae
from wan_patches.vae_parallel.tiles import balanced

__all__ = ["MODES", "ParallelVAE", "balanced", "is_wan_vae", "parallelize_vae"]
