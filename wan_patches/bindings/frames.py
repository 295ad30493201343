"""Converts video tensors to frames, for the `VideoProcessor` calls of all video pipelines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch

from wan_patches.bindings.output_buffers import OutputBuffers, output_buffers
from wan_patches.bindings.processors import is_stock
from wan_patches.ops import frames
from wan_patches.patches.processors import POSTPROCESS
from wan_patches.patching import tally


def postprocess_video(
    stock: Callable[..., Any], processor: Any, video: torch.Tensor, output_type: str, **kwargs: Any
) -> Any:
    """Returns the result of the stock method for `video` of shape `(batch, channels, frames, height, width)`.

    Takes the fast path for `"pil"` and `"np"` output of RGB videos in a floating dtype, and falls back to stock
    otherwise. The fast path respects `wan_patches.bindings.output_buffers`: frames are computed directly into the
    memory given there, or copied into it once from an accelerator.
    """
    if (reason := _reason_against(processor, video, output_type, kwargs)) is not None:
        tally.note("frames", "", reason)
        return stock(processor, video, output_type, **kwargs)
    to = output_buffers.get()
    if output_type == "np":
        return _to_numpy(stock, processor, video, to)
    return _to_pil(stock, processor, video, to)


def _reason_against(processor: Any, video: torch.Tensor, output_type: str, others: Mapping[str, Any]) -> str | None:
    """Why this video falls back to the stock implementation, or None."""
    if output_type not in ("pil", "np"):
        return "the output type is neither pil nor np"
    if others:
        return "there are more arguments"
    if type(video) is not torch.Tensor or video.layout != torch.strided or video.is_meta:
        return "the video is not a plain tensor"
    if video.dim() != 5 or video.shape[1] != 3 or video.numel() == 0:
        return "the video is not (batch, 3, frames, height, width)"
    if video.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the video is {video.dtype}"
    if video.requires_grad:
        return "gradients are recorded"
    if not is_stock(processor, POSTPROCESS, do_normalize=True):
        return "the processor does not normalise, or has a method that is not stock's"
    return None


def _to_pil(stock: Callable[..., Any], processor: Any, video: torch.Tensor, to: OutputBuffers | None) -> Any:
    def of_stock(video: torch.Tensor) -> torch.Tensor:
        with np.errstate(invalid="ignore"):
            images = stock(processor, video, "pil")
        return torch.from_numpy(np.stack([np.stack([np.asarray(i) for i in batch]) for batch in images]))

    total = torch.zeros((), dtype=torch.float32, device=video.device)
    op = functools.partial(frames.video_to_uint8, total=total)
    made = _made(frames.to_uint8, op, of_stock, video, torch.uint8, to)
    if total.isnan():  # numpy warns or raises, depending on its settings
        return stock(processor, video, "pil")
    image = PIL.Image.fromarray if to is None else to.image
    return [[image(frame) for frame in batch] for batch in made.numpy()]


def _to_numpy(stock: Callable[..., Any], processor: Any, video: torch.Tensor, to: OutputBuffers | None) -> Any:
    def of_stock(video: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(stock(processor, video, "np"))

    return _made(frames.to_float, frames.video_to_float, of_stock, video, torch.float32, to).numpy()


def _made(
    op: Callable[..., Any],
    make: Callable[..., Any],
    of_stock: Callable[..., Any],
    video: torch.Tensor,
    dtype: torch.dtype,
    to: OutputBuffers | None,
) -> torch.Tensor:
    """Returns the frames on the CPU, in the memory of `to` if given; on accelerators the gate checks them first."""
    out = None if to is None else to.empty_strided(*frames.layout(video, dtype), dtype)
    made = op(video, make, of_stock, out)
    # at first sight, and if the form is not exact, the gate returns stock's result in newly allocated memory
    return made if out is None or made is out else out.copy_(made)
