"""Construction of the condition mask and the condition video in image-to-video pipelines."""

from __future__ import annotations

from wan_patches.patches.versions import since
from wan_patches.patching.fingerprints import AUTOENCODER, relied_on
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Block, Replace

_CALL = "_wan_patches_condition_mask"
_VIDEO = "_wan_patches_condition_video"


def _block(temporal: str, frames: str, last_frame: str, *fingerprints: str) -> Block:
    return Block(
        first="mask_lat_size = torch.ones(*ARGS)",
        last="mask_lat_size = mask_lat_size.to(DEVICE)",
        replacement=f"mask_lat_size = {_CALL}(batch_size, {frames}, latent_height, latent_width, {temporal}, DEVICE,"
        f" {last_frame})",
        fingerprints=frozenset(fingerprints),
    )


def _patch(module: str, *targets: Target, optional: bool = False) -> Patch:
    return Patch(
        name="conditioning",
        module=f"diffusers.{module}",
        targets=targets,
        calls={_CALL: "wan_patches.bindings.conditioning:condition_mask"},
        implementations={"all devices": "built in latent frames"},
        optional=optional,
        since=since(module),
    )


# the VAE that reads the condition video in slices: `AutoencoderKLWan` from diffusers 0.35 to 0.42
_ENCODE = relied_on(AUTOENCODER, *(f"AutoencoderKLWan.{name}" for name in ("encode", "_encode", "tiled_encode")))


def _video(module: str, qualname: str, last_frame: bool) -> Patch:
    first = Replace("torch.cat([FIRST, FIRST.new_zeros(*ARGS)], dim=2)", f"{_VIDEO}(self.vae, FIRST, None, *ARGS)")
    last = Replace("torch.cat([FIRST, FIRST.new_zeros(*ARGS), LAST], dim=2)", f"{_VIDEO}(self.vae, FIRST, LAST, *ARGS)")
    return Patch(
        name="conditioning",
        module=f"diffusers.{module}",
        targets=(Target(qualname, (first, last) if last_frame else (first,)),),
        calls={_VIDEO: "wan_patches.bindings.conditioning:condition_video"},
        implementations={"all devices": "the encoder is given chunks of a video that is never built"},
        requires=_ENCODE,
        since=since(module),
    )


_FIRST = _block("self.vae_scale_factor_temporal", "num_frames", "False", "4f3ec3ad5d98d8bc")
_FIRST_OR_LAST = _block("self.vae_scale_factor_temporal", "num_frames", "last_image is not None", "a5441adcb01c6c3f")
_MODULAR = tuple(
    Target(
        f"{step}.__call__",
        (_block("components.vae_scale_factor_temporal", "block_state.num_frames", last_frame, known),),
    )
    for step, last_frame, known in (
        ("WanPrepareFirstFrameLatentsStep", "False", "64d1928c49496e44"),
        ("WanPrepareFirstLastFrameLatentsStep", "True", "8fe60d16d7c870f2"),
    )
)

PATCHES = (
    _patch("pipelines.wan.pipeline_wan_i2v", Target("WanImageToVideoPipeline.prepare_latents", (_FIRST_OR_LAST,))),
    _patch(
        "pipelines.skyreels_v2.pipeline_skyreels_v2_i2v",
        Target("SkyReelsV2ImageToVideoPipeline.prepare_latents", (_FIRST_OR_LAST,)),
    ),
    _patch("pipelines.chronoedit.pipeline_chronoedit", Target("ChronoEditPipeline.prepare_latents", (_FIRST,))),
    _patch("modular_pipelines.wan.encoders", *_MODULAR, optional=True),
    _patch("modular_pipelines.wan.before_denoise", *_MODULAR, optional=True),  # diffusers 0.36
    _video("pipelines.wan.pipeline_wan_i2v", "WanImageToVideoPipeline.prepare_latents", True),
    _video("pipelines.skyreels_v2.pipeline_skyreels_v2_i2v", "SkyReelsV2ImageToVideoPipeline.prepare_latents", True),
    _video("pipelines.chronoedit.pipeline_chronoedit", "ChronoEditPipeline.prepare_latents", False),
)
