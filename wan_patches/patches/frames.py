"""Video tensors to frames: `VideoProcessor.postprocess_video`, through which every video pipeline goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wan_patches.codeswap import STOCK
from wan_patches.patches.processors import POSTPROCESS, is_stock, known
from wan_patches.registry import Patch, Target
from wan_patches.rewrite import Body

_CALL, _STOCK = "_wan_patches_postprocess_video", "_wan_patches_stock_postprocess_video"

PATCHES = (
    Patch(
        name="frames",
        module="diffusers.video_processor",
        targets=(
            Target(
                "VideoProcessor.postprocess_video",
                (
                    Body(
                        replacements=(
                            ("d3341922baa70b18", f"return {_CALL}({_STOCK}, self, video, output_type)"),  # to 0.36
                            ("d3a5a3d56604a394", f"return {_CALL}({_STOCK}, self, video, output_type, **kwargs)"),
                        )
                    ),
                ),
            ),
        ),
        calls={_CALL: "wan_patches.patches.frames:postprocess_video", _STOCK: STOCK},
        implementations={"all devices": "bytes made a few frames at a time"},
        requires=known(POSTPROCESS),
    ),
)


def postprocess_video(stock: Callable[..., Any], processor: Any, video: Any, output_type: str, **kwargs: Any) -> Any:
    """What stock's method returns for `video` of shape `(batch, channels, frames, height, width)`.

    `"pil"` and `"np"` of RGB videos in a floating dtype take the fast way; everything else is stock's.
    """
    import torch

    fast = (
        output_type in ("pil", "np")
        and not kwargs
        and type(video) is torch.Tensor
        and video.dim() == 5
        and video.shape[1] == 3
        and video.numel() > 0
        and video.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not video.requires_grad
        and processor.config.do_normalize
        and is_stock(processor, POSTPROCESS)
    )
    if not fast:
        return stock(processor, video, output_type, **kwargs)
    if output_type == "np":
        return _to_numpy(stock, processor, video)
    return _to_pil(stock, processor, video)


def _to_pil(stock: Callable[..., Any], processor: Any, video: Any) -> Any:
    import numpy as np
    import PIL.Image
    import torch

    from wan_patches.fidelity import gate, signature
    from wan_patches.ops.frames import video_to_uint8

    if video.is_cpu:
        frames = video_to_uint8(video)
    else:

        def reference(video: torch.Tensor) -> torch.Tensor:
            images = stock(processor, video, "pil")
            return torch.from_numpy(np.stack([np.stack([np.asarray(i) for i in batch]) for batch in images]))

        def implementation(video: torch.Tensor) -> torch.Tensor:
            return video_to_uint8(video).cpu()

        frames = gate("frames to uint8", signature(video), implementation, reference, video)
    return [[PIL.Image.fromarray(frame) for frame in batch] for batch in frames.numpy()]


def _to_numpy(stock: Callable[..., Any], processor: Any, video: Any) -> Any:
    import torch

    from wan_patches.fidelity import gate, signature
    from wan_patches.ops.frames import video_to_float

    if video.is_cpu:
        return video_to_float(video).numpy()

    def reference(video: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(stock(processor, video, "np"))

    return gate("frames to float", signature(video), video_to_float, reference, video).numpy()
