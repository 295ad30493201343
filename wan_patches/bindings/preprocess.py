"""Converts PIL images and videos to tensors, for the `VideoProcessor` calls of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image
import torch

from wan_patches.bindings.processors import is_stock
from wan_patches.bindings.stock_functions import are_torch_functions, has_library_methods
from wan_patches.ops.images import preprocessed
from wan_patches.patches.processors import PREPROCESS, PREPROCESS_VIDEO
from wan_patches.patching import tally

_NOT_STOCKS = "the processor does something else, or has a method that is not stock's"
_SETTINGS = {
    "do_resize": True,
    "resample": "lanczos",
    "reducing_gap": None,
    "do_normalize": True,
    "do_convert_grayscale": False,
    "do_binarize": False,
}


def preprocess(processor: Any, device: torch.device | str | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs `processor.preprocess(image, height, width)` on `device`: `(images, 3, height, width)`, fp32 in [-1, 1]."""

    def stock() -> torch.Tensor:
        return processor.preprocess(*args, **kwargs)

    given = _arguments(processor, PREPROCESS, args, kwargs)
    if given is None:
        tally.note("preprocess", "", _NOT_STOCKS)
        return stock()
    image, height, width = given
    images = image if isinstance(image, list) else [image]
    size = _size_of_all(processor, [images], height, width)
    if isinstance(size, str):
        tally.note("preprocess", "", size)
        return stock()
    return _tensor(images, size, device, stock)


def preprocess_video(processor: Any, device: torch.device | str | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs `processor.preprocess_video(video, height, width)` on `device`.

    Returns:
        `(videos, 3, frames, height, width)`, fp32.
    """
    given = _arguments(processor, PREPROCESS_VIDEO, args, kwargs)
    if given is None:
        tally.note("preprocess", "", _NOT_STOCKS)
        return processor.preprocess_video(*args, **kwargs)
    video, height, width = given
    videos = video if isinstance(video, list) and video and isinstance(video[0], list) else [video]
    size = _size_of_all(processor, videos, height, width)
    if isinstance(size, str):
        tally.note("preprocess", "", size)
        return processor.preprocess_video(*args, **kwargs)

    def stock() -> torch.Tensor:
        return processor.preprocess_video(*args, **kwargs).transpose(1, 2).flatten(0, 1)

    pixels = _tensor([image for frames in videos for image in frames], size, device, stock)
    return pixels.unflatten(0, (len(videos), -1)).transpose(1, 2)


def _arguments(processor: Any, methods: tuple[str, ...], args: Any, kwargs: Any) -> tuple[Any, Any, Any] | None:
    """Returns images, height and width of a call, if the processor only resizes by Lanczos and normalises.

    None if the processor may do anything else, or if the call has other arguments.
    """
    if not has_library_methods(processor, "get_default_height_width") or not is_stock(processor, methods, **_SETTINGS):
        return None
    try:
        return _pictures_and_size(*args, **kwargs)
    except TypeError:
        return None


def _pictures_and_size(pictures: Any, /, height: Any = None, width: Any = None) -> tuple[Any, Any, Any]:
    return pictures, height, width


def _size_of_all(processor: Any, videos: list[Any], height: Any, width: Any) -> tuple[int, int] | str:
    """Returns the `(height, width)` that stock would resize these lists to, or the reason for the fallback."""
    if not are_torch_functions(torch.from_numpy):
        return "`torch.from_numpy` is not torch's own"
    if not all(isinstance(images, list) and len(images) == len(videos[0]) > 0 for images in videos):
        return "the input is not lists of images, as many in each"
    if not all(_is_plain(image) for images in videos for image in images):
        return "the input is not PIL images in RGB"
    sizes = {_size(processor, images, height, width) for images in videos}
    size = sizes.pop()
    return "the size is not whole numbers, the same for all" if size is None or sizes else size


def _is_plain(image: object) -> bool:
    """Whether `image` is an RGB image that Pillow's own code resizes."""
    return (
        isinstance(image, PIL.Image.Image)
        and image.mode == "RGB"
        and min(image.size) > 0
        and has_library_methods(image, "resize")
    )


def _size(processor: Any, images: list[PIL.Image.Image], height: Any, width: Any) -> tuple[int, int] | None:
    """Returns the `(height, width)` that stock would resize to, or None if that is not a valid size."""
    height, width = processor.get_default_height_width(images[0], height, width)
    whole = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    return (height, width) if whole else None


def _tensor(
    images: list[PIL.Image.Image],
    size: tuple[int, int],
    device: torch.device | str | None,
    stock: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Returns `stock()`, `(images, 3, *size)`, on `device` in the same strides (channels last, as arrays have them)."""
    return preprocessed(images, size, torch.device("cpu" if device is None else device), stock)
