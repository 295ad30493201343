"""Blending of tiles in autoencoders of videos and images: the same few lines in nearly all of diffusers'."""

from __future__ import annotations

from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body

# the fingerprints of each method, by the number of axes that it indexes
_TEXTS = {
    "blend_v": {5: ("f6e9ef1c44f40143", "809ac924e110436d"), 4: ("bfb2959c5e603e5e", "76f77d606026031c")},
    "blend_h": {5: ("b40dd958ed48461e", "9bf1e4793266de1f"), 4: ("56d8de3d217610fe", "e2f79b7968611279")},
}
_DIMS = {"blend_v": -2, "blend_h": -1}

#: Modules of autoencoders, and their classes.
_AUTOENCODERS = {
    "autoencoder_dc": "AutoencoderDC",
    "autoencoder_kl": "AutoencoderKL",
    "autoencoder_kl_cogvideox": "AutoencoderKLCogVideoX",
    "autoencoder_kl_flux2": "AutoencoderKLFlux2",
    "autoencoder_kl_hunyuan_video": "AutoencoderKLHunyuanVideo",
    "autoencoder_kl_hunyuanimage": "AutoencoderKLHunyuanImage",
    "autoencoder_kl_hunyuanimage_refiner": "AutoencoderKLHunyuanImageRefiner",
    "autoencoder_kl_hunyuanvideo15": "AutoencoderKLHunyuanVideo15",
    "autoencoder_kl_kvae": "AutoencoderKLKVAE",
    "autoencoder_kl_ltx": "AutoencoderKLLTXVideo",
    "autoencoder_kl_ltx2": "AutoencoderKLLTX2Video",
    "autoencoder_kl_magvit": "AutoencoderKLMagvit",
    "autoencoder_kl_mochi": "AutoencoderKLMochi",
    "autoencoder_kl_qwenimage": "AutoencoderKLQwenImage",
    "autoencoder_kl_qwenimage21": "AutoencoderKLQwenImage21",
    "autoencoder_kl_wan": "AutoencoderKLWan",
    "autoencoder_vidtok": "AutoencoderVidTok",
    "consistency_decoder_vae": "ConsistencyDecoderVAE",
    "ltx2_diffusion_decoder": "LTX2VideoDiffusionDecoderModel",
}


def _target(model: str, method: str) -> Target:
    arguments = f"_wan_patches_stock_{method}, self, a, b, blend_extent, {_DIMS[method]}"
    texts = {text: axes for axes, texts in _TEXTS[method].items() for text in texts}
    calls = tuple((text, f"return _wan_patches_blend({arguments}, {axes})") for text, axes in texts.items())
    return Target(f"{model}.{method}", (Body(calls),))


PATCHES = tuple(
    Patch(
        name="vae",
        module=f"diffusers.models.autoencoders.{module}",
        targets=tuple(_target(model, method) for method in _TEXTS),
        calls={
            "_wan_patches_blend": "wan_patches.bindings.vae_tiling:blend",
            **{f"_wan_patches_stock_{method}": STOCK for method in _TEXTS},
        },
        implementations={"CPUs": "a few frames at a time", "other devices": "all rows of an overlap at once"},
        optional=True,  # added over time: Wan's methods in 0.34, other models until 0.41
    )
    for module, model in _AUTOENCODERS.items()
)
