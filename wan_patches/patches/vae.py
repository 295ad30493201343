"""Wan's video autoencoder and Qwen-Image's: the operations between the convolutions, bit-identical to stock.

`clear_cache` begins every pass over a video (tiled, sliced, or of a tile on some rank). If the encoder or decoder is as
diffusers builds it, a `FrameCaches` replaces stock's list, and blocks that receive one take the fast path. With hooks,
compiled or quantised modules, adapters, autograd or autocast, stock's list is kept, and with it stock's code.
"""

from __future__ import annotations

from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.fingerprints import AUTOENCODER, PREFIXES, QWEN_AUTOENCODER, TEXTS, relied_on
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body, Replace

_HERE = "wan_patches.bindings.vae"
_CLONE, _BEGIN = "_wan_patches_vae_unchanged", "_wan_patches_vae_begin_chunk"

# methods, and the function in `bindings` that replaces each
_REPLACED = {
    "clear_cache": "clear_cache",
    "_decode": "decode",
    "Decoder3d.forward": "decode_chunk",
    "Encoder3d.forward": "encode_chunk",
    "ResidualBlock.forward": "residual_block",
    "Resample.forward": "resample",
}
_ARGUMENTS = {
    "clear_cache": "self",
    "decode": "self, z, return_dict",
    "decode_chunk": "self, x, feat_cache, feat_idx",
    "encode_chunk": "self, x, feat_cache, feat_idx",
    "residual_block": "self, x, feat_cache, feat_idx",
    "resample": "self, x, feat_cache, feat_idx",
}
_RELIED_ON = (
    *("CausalConv3d.__init__", "CausalConv3d.forward", "RMS_norm.forward", "Upsample.forward"),
    *("AttentionBlock.forward", "MidBlock.forward", "UpBlock.forward"),
)


def _patch(module: str, model: str, residual: bool) -> Patch:
    """Returns the patch of an autoencoder.

    model: the name of its class.
    residual: whether it has the blocks of Wan 2.2, with shortcuts around whole blocks.
    """
    prefix = PREFIXES[module]

    def replaced(method: str, function: str) -> Target:
        qualname = prefix + method if "." in method else f"{model}.{method}"
        arguments = _ARGUMENTS[function] + ", first_chunk" * (residual and function == "decode_chunk")
        call = f"return _wan_patches_vae_{function}(_wan_patches_stock_vae_{function}, {arguments})"
        return Target(qualname, (Body(replacements=tuple((text, call) for text in TEXTS[module][qualname])),))

    blocks = ("WanResidualUpBlock.forward", "WanResidualDownBlock.forward") if residual else ()
    shortcuts = ("DupUp3D.forward", "AvgDown3D.forward") if residual else ()
    return Patch(
        name="vae",
        module=module,
        targets=(
            *(replaced(*entry) for entry in _REPLACED.items()),
            Target(f"{model}._encode", (Replace("[0]", f"{_BEGIN}(self, i, iter_)"),)),
            *(Target(block, (Replace("x.clone()", f"{_CLONE}(x, feat_cache)"),)) for block in blocks),
        ),
        calls={
            **{f"_wan_patches_vae_{function}": f"{_HERE}:{function}" for function in _REPLACED.values()},
            **{f"_wan_patches_stock_vae_{function}": STOCK for function in _REPLACED.values()},
            **({_CLONE: f"{_HERE}:unchanged"} if residual else {}),
            _BEGIN: f"{_HERE}:begin_chunk",
        },
        implementations={
            "CPUs": "norms a few rows at a time, shared windows, two frames a step and first frames alone if exact",
            "CUDA with Triton": "kernels: norm and SiLU into shared windows, biases with lengths or residuals",
            "other devices": "shared windows in place of joined, padded and cloned tensors",
        },
        requires=relied_on(module, *(prefix + name for name in _RELIED_ON), *blocks, *shortcuts),
    )


PATCHES = (
    _patch(AUTOENCODER, "AutoencoderKLWan", residual=True),
    _patch(QWEN_AUTOENCODER, "AutoencoderKLQwenImage", residual=False),
)
