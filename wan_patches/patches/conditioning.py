"""Where diffusers builds the image-to-video condition mask."""

from wan_patches.registry import Patch, Target
from wan_patches.rewrite import Block

_CALL = "_wan_patches_condition_mask"


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
        calls={_CALL: "wan_patches.ops.conditioning:condition_mask"},
        implementations={"all devices": "built in latent frames"},
        optional=optional,
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
)
