"""Wan's video autoencoder: the operations between its convolutions, bit-identical to stock.

`clear_cache` begins every pass over a video (tiled, sliced, or of a tile on some rank). If the encoder or decoder is as
diffusers builds it, a `FrameCaches` replaces stock's list, and blocks that receive one take the fast path. With hooks,
compiled or quantised modules, adapters, autograd or autocast, stock's list is kept, and with it stock's code.
"""

from __future__ import annotations

from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.fingerprints import AUTOENCODER, TEXTS, relied_on
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body, Replace

_HERE = "wan_patches.bindings.vae"
_CLONE = "_wan_patches_vae_unchanged"

# target, and the function in `bindings` that replaces it
_REPLACED = (
    ("AutoencoderKLWan.clear_cache", "clear_cache"),
    ("AutoencoderKLWan._decode", "decode"),
    ("WanDecoder3d.forward", "decode_chunk"),
    ("WanEncoder3d.forward", "encode_chunk"),
    ("WanResidualBlock.forward", "residual_block"),
    ("WanResample.forward", "resample"),
)
_ARGUMENTS = {
    "clear_cache": "self",
    "decode": "self, z, return_dict",
    "decode_chunk": "self, x, feat_cache, feat_idx, first_chunk",
    "encode_chunk": "self, x, feat_cache, feat_idx",
    "residual_block": "self, x, feat_cache, feat_idx",
    "resample": "self, x, feat_cache, feat_idx",
}


def _replaced(qualname: str, function: str) -> Target:
    call = f"return _wan_patches_vae_{function}(_wan_patches_stock_vae_{function}, {_ARGUMENTS[function]})"
    return Target(qualname, (Body(replacements=tuple((text, call) for text in TEXTS[AUTOENCODER][qualname])),))


PATCHES = (
    Patch(
        name="vae",
        module=AUTOENCODER,
        targets=(
            *(_replaced(*entry) for entry in _REPLACED),
            *(
                Target(f"{block}.forward", (Replace("x.clone()", f"{_CLONE}(x, feat_cache)"),))
                for block in ("WanResidualUpBlock", "WanResidualDownBlock")
            ),
        ),
        calls={
            **{f"_wan_patches_vae_{function}": f"{_HERE}:{function}" for _, function in _REPLACED},
            **{f"_wan_patches_stock_vae_{function}": STOCK for _, function in _REPLACED},
            _CLONE: f"{_HERE}:unchanged",
        },
        implementations={
            "CPUs": "norms a few rows at a time, shared windows, two frames a step where that is exact",
            "CUDA with Triton": "shared windows, and norm and SiLU in a kernel",
            "other devices": "shared windows in place of joined, padded and cloned tensors",
        },
        requires=relied_on(
            AUTOENCODER,
            "WanCausalConv3d.__init__",
            "WanCausalConv3d.forward",
            "WanRMS_norm.forward",
            "WanUpsample.forward",
            "WanAttentionBlock.forward",
            "WanMidBlock.forward",
            "WanUpBlock.forward",
            "WanResidualUpBlock.forward",
            "WanResidualDownBlock.forward",
            "DupUp3D.forward",
            "AvgDown3D.forward",
        ),
    ),
)
