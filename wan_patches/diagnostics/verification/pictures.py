"""Compares the frames of two videos and selects some for display."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from wan_patches.diagnostics.verification.bits import psnr, ssim

__all__ = ["Strips", "Video", "compare_videos", "frames_of"]

_SHOWN = 6  # number of frames in the report


@dataclass(frozen=True)
class Video:
    """The frames that the pipeline returned.

    shape: `(frames, height, width, channels)`; the videos of a batch follow one another.
    peak: the largest possible pixel value, 255 for bytes and 1 for floats.
    psnr: of each frame, in dB; infinite for identical frames.
    ssim: structural similarity of each frame; None without scikit-image.
    """

    shape: tuple[int, ...]
    dtype: str
    peak: float
    psnr: tuple[float, ...]
    ssim: tuple[float, ...] | None


@dataclass(frozen=True)
class Strips:
    """Selected frames, uint8 `(height, width, 3)`: stock, patched, and their difference, whose maximum is white."""

    frames: tuple[int, ...]
    stock: tuple[np.ndarray, ...]
    patched: tuple[np.ndarray, ...]
    amplified: tuple[np.ndarray, ...]
    largest: float


def compare_videos(stock: Any, patched: Any) -> tuple[Video | None, Strips | None]:
    """Compares two pipeline results as videos; None if they are not videos, or differ in shape or dtype."""
    before, after = frames_of(stock), frames_of(patched)
    if before is None or after is None or before.shape != after.shape or before.dtype != after.dtype:
        return None, None
    peak = 255.0 if before.dtype == np.uint8 else 1.0
    structure = [ssim(a, b, peak) for a, b in zip(before, after)]
    video = Video(
        before.shape,
        str(before.dtype),
        peak,
        tuple(psnr(a, b, peak) for a, b in zip(before, after)),
        None if None in structure else tuple(one for one in structure if one is not None),
    )
    worst = [float(_apart(a, b).max(initial=0)) for a, b in zip(before, after)]
    largest = max(worst)
    chosen = {round(nth) for nth in np.linspace(0, len(before) - 1, min(_SHOWN, len(before)))}
    if largest:  # it replaces the nearest of the selected frames
        nth = worst.index(largest)
        chosen = {*chosen} - {min(chosen, key=lambda one: abs(one - nth))} | {nth}
    indices = tuple(sorted(chosen))
    pictures = [[_picture(pixels[nth], peak) for nth in indices] for pixels in (before, after)]
    amplified = [_picture(_apart(before[nth], after[nth]), largest or 1.0) for nth in indices]
    return video, Strips(indices, tuple(pictures[0]), tuple(pictures[1]), tuple(amplified), largest)


def frames_of(result: Any) -> np.ndarray | None:
    """Returns the frames of a pipeline result, `(frames, height, width, channels)`; None if its format is not clear."""
    for name in ("frames", "images", "videos"):
        result = getattr(result, name, result)
    if isinstance(result, tuple) and result:
        result = result[0]
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu()
        result = result.movedim(-3, -1) if result.dim() > 3 else result
        result = (result.float() if result.is_floating_point() else result).numpy()
    if isinstance(result, (list, tuple)):
        parts = [part for item in result for part in (item if isinstance(item, (list, tuple)) else [item])]
        if parts and all(isinstance(part, Image.Image) for part in parts):
            parts = [np.asarray(part.convert("RGB")) for part in parts]
        elif not parts or not all(isinstance(part, np.ndarray) for part in parts):
            return None
        if len({part.shape for part in parts}) > 1:
            return None
        result = np.stack(parts)
    if not isinstance(result, np.ndarray) or result.ndim < 4 or result.shape[-1] not in (1, 3, 4) or not result.size:
        return None
    return result.reshape(-1, *result.shape[-3:])


def _apart(stock: np.ndarray, patched: np.ndarray) -> np.ndarray:
    found = np.abs(stock.astype(np.float64) - patched)
    return np.nan_to_num(found, nan=1.0, posinf=1.0)


def _picture(frame: np.ndarray, peak: float) -> np.ndarray:
    pixels = (np.nan_to_num(frame.astype(np.float64)) / peak * 255).clip(0, 255).round().astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
