"""Runs Wan's VAE on several devices: each rank of a process group encodes or decodes a part of each video.

    parallel = parallelize_vae(pipe.vae)  # in every rank
    video = pipe(...)  # the same call, with the same arguments, in every rank
    parallel.restore()

    tiles     stock's tiles are distributed over the ranks, exchanged, and blended in every rank: EXACT, bit-identical
              to stock with `vae.enable_tiling()`
    spatial   each rank computes a slab of the image, and convolutions get the adjacent rows from the neighbours:
              CLOSE to stock without tiling, because convolutions of slabs round in a different order

The installed model runs with its own modules and methods, in stock's order.
"""

from __future__ import annotations

from wan_patches.vae_parallel.model import is_wan_vae
from wan_patches.vae_parallel.parallelize import MODES, ParallelVAE, parallelize_vae
from wan_patches.vae_parallel.tiles import balanced

__all__ = ["MODES", "ParallelVAE", "balanced", "is_wan_vae", "parallelize_vae"]
