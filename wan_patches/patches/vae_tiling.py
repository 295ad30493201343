"""Blending of tiles in Wan's VAE, which all model families here use."""

from __future__ import annotations

from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body


def _patch(method: str, dim: int, fingerprint: str) -> Patch:
    call, stock = "_wan_patches_blend", f"_wan_patches_stock_{method}"
    statement = f"return {call}({stock}, self, a, b, blend_extent, {dim})"
    return Patch(
        name="vae",
        module="diffusers.models.autoencoders.autoencoder_kl_wan",
        targets=(Target(f"AutoencoderKLWan.{method}", (Body(((fingerprint, statement),)),)),),
        calls={call: "wan_patches.bindings.vae_tiling:blend", stock: STOCK},
        implementations={"CPUs": "a few frames at a time", "other devices": "all rows of an overlap at once"},
        optional=True,  # since diffusers 0.34
    )


PATCHES = (_patch("blend_v", -2, "f6e9ef1c44f40143"), _patch("blend_h", -1, "b40dd958ed48461e"))
