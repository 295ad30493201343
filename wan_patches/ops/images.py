"""Images to tensors in [-1, 1], resized with Pillow's Lanczos: by Pillow on CPUs, in its arithmetic on accelerators."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import PIL.Image
import torch

from wan_patches.ops.dispatch import ACCELERATOR, SMALL, Key, is_below, op
from wan_patches.ops.resize import lanczos_resize, normalize_uint8, supported

Size = tuple[int, int]

_SMALL = 1 << 22  # values below which the resize, which stays Pillow's, dominates the time on a CPU


def _key(images: list[PIL.Image.Image], size: Size, device: torch.device, stock: Callable[[], Any]) -> Key:
    return device, size, tuple(image.size for image in images)


def _tells_nothing(images: list[PIL.Image.Image], size: Size, device: torch.device, stock: Callable[[], Any]) -> bool:
    """Whether an image has a single colour, which any resize keeps."""
    extrema: Any = [image.getextrema() for image in images]  # a pair for each channel
    return any(low == high for channels in extrema for low, high in channels)


@op("preprocess", key=_key, tells_nothing=_tells_nothing, autocasts=False)
def preprocessed(
    images: list[PIL.Image.Image], size: Size, device: torch.device, stock: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Returns `(images, 3, height, width)` on `device`, fp32, channels-last in memory as arrays are.

    Args:
        images: RGB images.
        size: `(height, width)` of the result.
        device: of the result.
        stock: returns the same tensor, on any device.
    """
    return stock().to(device)


@preprocessed.form("resized by Pillow, written once", device="cpu")
def on_cpu(
    images: list[PIL.Image.Image], size: Size, device: torch.device, stock: Callable[[], torch.Tensor]
) -> torch.Tensor:
    height, width = size
    out: Any = None
    for nth, image in enumerate(images):
        resized = torch.from_numpy(
            np.array(image.resize((width, height), resample=PIL.Image.Resampling.LANCZOS, reducing_gap=None))
        )
        if out is None:  # after Pillow has validated the size
            shape = (len(images), height, width, 3)
            out = torch.empty(shape, dtype=torch.float32, device="cpu").permute(0, 3, 1, 2)
        normalize_uint8(resized[None], out=out[nth : nth + 1])
    return out


@on_cpu.refuses
def _(images: list[PIL.Image.Image], size: Size, device: torch.device, stock: Callable[[], torch.Tensor]) -> str | None:
    height, width = size
    return SMALL if is_below(_SMALL, len(images) * height * width * 3) else None


@preprocessed.form("uploaded as bytes, resized there", device=ACCELERATOR)
def on_device(
    images: list[PIL.Image.Image], size: Size, device: torch.device, stock: Callable[[], torch.Tensor]
) -> torch.Tensor:
    flat = torch.from_numpy(np.concatenate([np.asarray(image).reshape(-1) for image in images])).to(device)
    out = torch.empty((len(images), *size, 3), dtype=torch.float32, device=device).permute(0, 3, 1, 2)
    done, start = 0, 0
    for (width, height), group in groupby(images, key=lambda image: image.size):
        count = len(list(group))
        end = start + count * height * width * 3
        pixels = flat[start:end].view(count, height, width, 3)
        normalize_uint8(lanczos_resize(pixels, *size), out=out[done : done + count])
        done, start = done + count, end
    return out


@on_device.refuses
def _(images: list[PIL.Image.Image], size: Size, device: torch.device, stock: Callable[[], torch.Tensor]) -> str | None:
    known = all(supported(image.height, image.width, *size) for image in images)
    return None if known else "there is no exact resize between these sizes"
