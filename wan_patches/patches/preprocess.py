"""Conversion of PIL images and videos to tensors, in pipelines.

These are the calls of `VideoProcessor.preprocess` and `preprocess_video`. A processor does not know the target device
of its result, but the pipelines do, so the calls in the pipelines are rewritten. Input other than RGB PIL images with a
plain Lanczos resize falls back to stock. Unchanged are calls whose result is processed before it reaches the device
(VACE's reference images, FramePack), that crop or fill (Wan-Animate's character image, Kandinsky 6), that only ever get
tensors (the causal AnyFlow pipeline), or that belong to transformers (Wan 2.1's CLIP image processor).
"""

from __future__ import annotations

from wan_patches.patches.processors import PREPROCESS_VIDEO, known
from wan_patches.patches.versions import since
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Replace

_CALL = "_wan_patches_preprocess"
_CALL_VIDEO = "_wan_patches_preprocess_video"


def _image(count: int, owner: str = "self") -> Replace:
    return Replace(
        f"{owner}.video_processor.preprocess(*ARGS)", f"{_CALL}({owner}.video_processor, device, *ARGS)", count
    )


def _video(count: int, owner: str = "self", device: str = "device") -> Replace:
    return Replace(
        f"{owner}.video_processor.preprocess_video(*ARGS)",
        f"{_CALL_VIDEO}({owner}.video_processor, {device}, *ARGS)",
        count,
    )


def _patch(module: str, *targets: Target, optional: bool = False) -> Patch:
    return Patch(
        name="preprocess",
        module=f"diffusers.{module}",
        targets=targets,
        calls={
            _CALL: "wan_patches.bindings.preprocess:preprocess",
            _CALL_VIDEO: "wan_patches.bindings.preprocess:preprocess_video",
        },
        implementations={
            "CPUs": "PIL resize, normalised in place",
            "other devices": "one upload of bytes, Pillow's Lanczos in integers",
        },
        requires=known(PREPROCESS_VIDEO),
        optional=optional,
        since=since(module),
    )


def _pipeline(module: str, name: str, *edits: Replace, method: str = "__call__") -> Patch:
    return _patch(f"pipelines.{module}", Target(f"{name}.{method}", edits))


_SKYREELS = "skyreels_v2.pipeline_skyreels_v2"

PATCHES = (
    _pipeline("wan.pipeline_wan_i2v", "WanImageToVideoPipeline", _image(2)),
    _pipeline("wan.pipeline_wan_video2video", "WanVideoToVideoPipeline", _video(1)),
    _pipeline("wan.pipeline_wan_vace", "WanVACEPipeline", _video(2), method="preprocess_conditions"),
    _pipeline("wan.pipeline_wan_animate", "WanAnimatePipeline", _video(3)),
    _pipeline(f"{_SKYREELS}_i2v", "SkyReelsV2ImageToVideoPipeline", _image(2)),
    _pipeline(f"{_SKYREELS}_diffusion_forcing_i2v", "SkyReelsV2DiffusionForcingImageToVideoPipeline", _image(2)),
    _pipeline(f"{_SKYREELS}_diffusion_forcing_v2v", "SkyReelsV2DiffusionForcingVideoToVideoPipeline", _video(1)),
    _pipeline("chronoedit.pipeline_chronoedit", "ChronoEditPipeline", _image(1)),
    _pipeline("sana_video.pipeline_sana_video_i2v", "SanaImageToVideoPipeline", _image(1)),
    _pipeline("lucy.pipeline_lucy_edit", "LucyEditPipeline", _video(1)),
    _pipeline("cosmos.pipeline_cosmos2_video2world", "Cosmos2VideoToWorldPipeline", _image(1), _video(1)),
    _pipeline("cosmos.pipeline_cosmos_video2world", "CosmosVideoToWorldPipeline", _image(1), _video(1)),
    _pipeline("cogvideo.pipeline_cogvideox_image2video", "CogVideoXImageToVideoPipeline", _image(1)),
    _pipeline("cogvideo.pipeline_cogvideox_video2video", "CogVideoXVideoToVideoPipeline", _video(1)),
    _pipeline("cogvideo.pipeline_cogvideox_fun_control", "CogVideoXFunControlPipeline", _video(1)),
    _pipeline("hunyuan_video.pipeline_hunyuan_video_image2video", "HunyuanVideoImageToVideoPipeline", _image(1)),
    _pipeline("kandinsky5.pipeline_kandinsky_i2v", "Kandinsky5I2VPipeline", _image(1), method="prepare_latents"),
    _pipeline("ltx.pipeline_ltx_image2video", "LTXImageToVideoPipeline", _image(1)),
    _pipeline("ltx.pipeline_ltx_condition", "LTXConditionPipeline", _image(1), _video(1)),
    _pipeline("ltx.pipeline_ltx_latent_upsample", "LTXLatentUpsamplePipeline", _video(1)),
    _pipeline("ltx2.pipeline_ltx2_image2video", "LTX2ImageToVideoPipeline", _image(1)),
    _pipeline("ltx2.pipeline_ltx2_latent_upsample", "LTX2LatentUpsamplePipeline", _video(1)),
    _pipeline("motif_video.pipeline_motif_video_image2video", "MotifVideoImage2VideoPipeline", _video(1)),
    _pipeline("animatediff.pipeline_animatediff_video2video", "AnimateDiffVideoToVideoPipeline", _video(1)),
    _pipeline("helios.pipeline_helios", "HeliosPipeline", _image(1), _video(1)),
    _pipeline("helios.pipeline_helios_pyramid", "HeliosPyramidPipeline", _image(1), _video(1)),
    _pipeline(
        "anyflow.pipeline_anyflow",
        "AnyFlowPipeline",
        _video(1, device="self._execution_device"),
        method="encode_video",
    ),
    _patch(
        "modular_pipelines.wan.encoders",
        Target("WanVaeEncoderStep.__call__", (_image(1, "components"),), "WanVaeImageEncoderStep.__call__"),
        Target(
            "WanFirstLastFrameVaeEncoderStep.__call__",
            (_image(2, "components"),),
            "WanFirstLastFrameVaeImageEncoderStep.__call__",
        ),
        optional=True,  # since diffusers 0.36
    ),
    _patch(
        "modular_pipelines.wan.encoders",
        Target("WanVaceEncoderStep.preprocess_conditions", (_video(2, "components"),)),
        optional=True,  # since diffusers 0.41
    ),
    _patch(
        "modular_pipelines.helios.encoders",
        Target("HeliosImageVaeEncoderStep.__call__", (_image(1, "components"),)),
        Target("HeliosVideoVaeEncoderStep.__call__", (_video(1, "components"),)),
        optional=True,  # absent in some versions that have Helios
    ),
)
