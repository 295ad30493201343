"""PIL images and videos to tensors: the calls of `VideoProcessor.preprocess` and `preprocess_video` in pipelines.

A processor does not know the device that its result goes to; the pipelines do, so the calls are rewritten
where they stand. What is not RGB PIL input for a plain Lanczos resize goes to stock, and so does what
computes on the result before it reaches the device (VACE's reference images), crops or fills
(Wan-Animate's character image), or belongs to transformers (Wan 2.1's CLIP image processor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wan_patches.bindings.originals import are_torchs, has_librarys
from wan_patches.patches.processors import PREPROCESS, PREPROCESS_VIDEO, is_stock, known
from wan_patches.patches.versions import since
from wan_patches.patching import tally
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Replace

_CALL = "_wan_patches_preprocess"
_CALL_VIDEO = "_wan_patches_preprocess_video"
_NOT_STOCKS = "the processor does something else, or has a method that is not stock's"
_SETTINGS = {
    "do_resize": True,
    "resample": "lanczos",
    "reducing_gap": None,
    "do_normalize": True,
    "do_convert_grayscale": False,
    "do_binarize": False,
}


def _image(count: int, owner: str = "self") -> Replace:
    return Replace(
        f"{owner}.video_processor.preprocess(*ARGS)", f"{_CALL}({owner}.video_processor, device, *ARGS)", count
    )


def _video(count: int, owner: str = "self") -> Replace:
    return Replace(
        f"{owner}.video_processor.preprocess_video(*ARGS)",
        f"{_CALL_VIDEO}({owner}.video_processor, device, *ARGS)",
        count,
    )


def _patch(module: str, *targets: Target, optional: bool = False) -> Patch:
    return Patch(
        name="preprocess",
        module=f"diffusers.{module}",
        targets=targets,
        calls={
            _CALL: "wan_patches.patches.preprocess:preprocess",
            _CALL_VIDEO: "wan_patches.patches.preprocess:preprocess_video",
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
    _pipeline("helios.pipeline_helios", "HeliosPipeline", _image(1), _video(1)),
    _pipeline("helios.pipeline_helios_pyramid", "HeliosPyramidPipeline", _image(1), _video(1)),
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
        optional=True,  # not in every version that has Helios
    ),
)


def preprocess(processor: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    """`processor.preprocess(image, height, width)` on `device`: `(images, 3, height, width)`, fp32 in [-1, 1]."""

    def stock() -> Any:
        return processor.preprocess(*args, **kwargs)

    given = _arguments(processor, PREPROCESS, args, kwargs)
    if given is None:
        tally.note("preprocess", "", _NOT_STOCKS)
        return stock()
    image, height, width = given
    images = image if isinstance(image, list) else [image]
    if (reason := _reason_against(processor, [images], height, width)) is not None:
        tally.note("preprocess", "", reason)
        return stock()
    return _tensor(images, _size(processor, images, height, width), device, stock)


def preprocess_video(processor: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    """`processor.preprocess_video(video, height, width)` on `device`: `(videos, 3, frames, height, width)`, fp32."""
    given = _arguments(processor, PREPROCESS_VIDEO, args, kwargs)
    if given is None:
        tally.note("preprocess", "", _NOT_STOCKS)
        return processor.preprocess_video(*args, **kwargs)
    video, height, width = given
    videos = video if isinstance(video, list) and video and isinstance(video[0], list) else [video]
    if (reason := _reason_against(processor, videos, height, width)) is not None:
        tally.note("preprocess", "", reason)
        return processor.preprocess_video(*args, **kwargs)

    def stock() -> Any:
        return processor.preprocess_video(*args, **kwargs).transpose(1, 2).flatten(0, 1)

    size = _size(processor, videos[0], height, width)
    pixels = _tensor([image for frames in videos for image in frames], size, device, stock)
    return pixels.unflatten(0, (len(videos), -1)).transpose(1, 2)


def _arguments(processor: Any, methods: tuple[str, ...], args: Any, kwargs: Any) -> tuple[Any, Any, Any] | None:
    """Pictures, height and width that a call gives to a processor that resizes by Lanczos and normalises.

    None of a processor that may do something else, or a call with other arguments.
    """
    if not has_librarys(processor, "get_default_height_width") or not is_stock(processor, methods, **_SETTINGS):
        return None
    try:
        return _pictures_and_size(*args, **kwargs)
    except TypeError:
        return None


def _pictures_and_size(pictures: Any, /, height: Any = None, width: Any = None) -> tuple[Any, Any, Any]:
    return pictures, height, width


def _reason_against(processor: Any, videos: list[Any], height: Any, width: Any) -> str | None:
    """Why these lists of images take stock's way; None where they need not."""
    import torch

    if not are_torchs(torch.from_numpy):
        return "`torch.from_numpy` is not torch's own"
    if not all(isinstance(images, list) and len(images) == len(videos[0]) > 0 for images in videos):
        return "the input is not lists of images, as many in each"
    if not all(_is_plain(image) for images in videos for image in images):
        return "the input is not PIL images in RGB"
    sizes = {_size(processor, images, height, width) for images in videos}
    return "the size is not whole numbers, the same for all" if None in sizes or len(sizes) > 1 else None


def _is_plain(image: Any) -> bool:
    """Whether it is an image in RGB that Pillow's own code resizes."""
    import PIL.Image

    return (
        isinstance(image, PIL.Image.Image)
        and image.mode == "RGB"
        and min(image.size) > 0
        and has_librarys(image, "resize")
    )


def _size(processor: Any, images: list[Any], height: Any, width: Any) -> Any:
    """The `(height, width)` that stock would resize to; None where that is not a size."""
    height, width = processor.get_default_height_width(images[0], height, width)
    whole = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    return (height, width) if whole else None


def _tensor(images: list[Any], size: tuple[int, int], device: Any, stock: Callable[[], Any]) -> Any:
    """`(images, 3, *size)` on `device`: what `stock()` uploads, in its strides (channels last, as arrays have them)."""
    import torch

    from wan_patches.ops.images import preprocessed

    return preprocessed(images, size, torch.device("cpu" if device is None else device), stock)
