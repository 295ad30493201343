"""Conditions: the mask and the video of image-to-video pipelines, and tokens of several prompts (HunyuanVideo 1.5)."""

from __future__ import annotations

from wan_patches.patches.versions import since
from wan_patches.patching.fingerprints import AUTOENCODER, relied_on
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Block, Edit, Replace

_CALL = "_wan_patches_condition_mask"
_VIDEO = "_wan_patches_condition_video"
_TOKENS, _IMAGE = "_wan_patches_prompt_tokens", "_wan_patches_image_tokens"


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


def _prompts(module: str, model: str, call: str, fingerprint: str, *before: Edit) -> Patch:
    """Returns the patch of a forward that moves the valid tokens of all its prompts before the invalid ones."""
    joined = Block(
        first="new_encoder_hidden_states = []",
        last="encoder_attention_mask = torch.stack(new_encoder_attention_mask)",
        replacement=f"encoder_hidden_states, encoder_attention_mask = {_TOKENS}({call})",
        fingerprints=frozenset((fingerprint,)),
    )
    return Patch(
        name="conditioning",
        module=f"diffusers.models.transformers.{module}",
        targets=(Target(f"{model}.forward", (*before, joined)),),
        calls={
            name: f"wan_patches.bindings.conditioning:{name.removeprefix('_wan_patches_')}"
            for name in (_TOKENS, _IMAGE)
        },
        implementations={"CPUs": "stock", "other devices": "the tokens of prompts are sorted by validity"},
        since=since(module),
    )


_PROMPT, _SECOND, _OF_IMAGE = (f"(encoder_hidden_states{nth}, encoder_attention_mask{nth})" for nth in ("", "_2", "_3"))
_IS_THERE_AN_IMAGE = Block(
    first="is_t2v = torch.all(image_embeds == 0)",
    last="encoder_hidden_states_3_cond_emb = EMBEDDED",
    replacement=f"{_OF_IMAGE}, encoder_hidden_states_3_cond_emb = "
    f"{_IMAGE}(encoder_hidden_states_3, image_embeds, encoder_attention_mask), EMBEDDED",
    fingerprints=frozenset(("c4f1ad4a0b452974",)),
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
    _prompts("transformer_hunyuanimage", "HunyuanImageTransformer2DModel", f"{_SECOND}, {_PROMPT}", "4cea9cdb62050208"),
    _prompts(
        "transformer_hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        f"{_OF_IMAGE}, {_SECOND}, {_PROMPT}, zeroed=2",
        "9fd63028703cabfa",
        _IS_THERE_AN_IMAGE,
    ),
)
