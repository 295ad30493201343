"""Converts decoded video to frames: bytes for images, or floats in [0, 1].

`x * 0.5 + 0.5` is rounded after each step in the video's own dtype, then clamped; the remaining steps are in fp32. The
constants are not folded: folding them, or computing in fp32 throughout, changes pixels of half-precision videos.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from wan_patches.ops.dispatch import Key, key_of, op

_CPU_CHUNK = 4_800_000  # elements, four frames of 480 x 832: fewer are faster on idle cores, but not on shared ones
_CHUNK = 1 << 24  # elements on accelerators: 64 MiB of fp32, few launches
_FEW_CHANNELS = 4


def video_to_uint8(
    video: torch.Tensor,
    out: torch.Tensor | None = None,
    frames_per_chunk: int | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the pixels of diffusers' `VideoProcessor.postprocess_video(video, "pil")`.

    Processes a few frames at a time in reused buffers. Waits for the device only to copy to an `out` on another device.

    Args:
        video: `(batch, channels, frames, height, width)` in [-1, 1], any floating dtype, strides and device; values
            outside (infinities too) are clamped, NaN becomes 0. Must not require grad.
        out: uint8 `(batch, frames, height, width, channels)`, any strides, written in place: frame by frame if on the
            device of `video`, otherwise in one copy at the end.
        frames_per_chunk: frames processed at a time, by default some five million elements on the CPU and some sixteen
            million elsewhere.
        total: fp32, 0-D, on the device of `video`; becomes NaN if and only if `video` contains NaN.

    Returns:
        `out`, or a new contiguous uint8 tensor, `(batch, frames, height, width, channels)`, on the device of `video`.
        EXACT: ties are rounded to even.

    Raises:
        TypeError: `video` is not floating, or `out` not uint8.
        ValueError: `video` is not five-dimensional, `out` has another shape, or `frames_per_chunk` is below one.
    """
    _check(video, out, torch.uint8)
    _, channels, frames, _, _ = video.shape
    step = _step(video, frames_per_chunk)
    made = _result(video, out, torch.uint8)
    total = torch.zeros((), dtype=torch.float32, device=video.device) if total is None else total
    scratch = _buffer(video, step, video.dtype)
    floats = scratch if video.dtype == torch.float32 else _buffer(video, step, torch.float32)
    for item, frames_out in zip(video, made, strict=True):
        for chunk in _chunks(frames, step):
            source = item[:, chunk]
            values = torch.mul(source, 0.5, out=scratch[:, : source.shape[1]]).add_(0.5)
            _clamp(values, total)
            if floats is not scratch:
                values = floats[:, : source.shape[1]].copy_(values)
            values.mul_(255).round_()
            if not video.is_cpu or channels > _FEW_CHANNELS:
                frames_out[chunk].copy_(values.permute(1, 2, 3, 0))
                continue
            # plane by plane, because ATen's copy of a permutation would run its inner loop over the few channels
            for channel, plane in enumerate(values):
                frames_out[chunk, ..., channel].copy_(plane)
    return made if out is None or made is out else out.copy_(made)


def video_to_float(
    video: torch.Tensor, out: torch.Tensor | None = None, frames_per_chunk: int | None = None
) -> torch.Tensor:
    """Returns the array of diffusers' `VideoProcessor.postprocess_video(video, "np")`, as a CPU tensor.

    Copies once from the device, and does not copy to stack the batch.

    Args:
        video: as in `video_to_uint8`; NaN stays NaN.
        out: as in `video_to_uint8`, but fp32.
        frames_per_chunk: as in `video_to_uint8`.

    Returns:
        `out`, or a new fp32 CPU tensor, `(batch, frames, height, width, channels)`, with the strides of stock's array:
        a stack of items that each keep the memory order of the axes of `video` (so a contiguous video gives
        `(batch, channels, frames, height, width)` in memory). EXACT.

    Raises:
        TypeError: `video` is not floating, or `out` not fp32.
        ValueError: `video` is not five-dimensional, `out` has another shape, or `frames_per_chunk` is below one.
    """
    _check(video, out, torch.float32)
    step = _step(video, frames_per_chunk)
    made = _result(video, out, torch.float32)
    scratch = None if video.dtype == torch.float32 else _buffer(video, step, video.dtype)
    for item, item_out in zip(video, made.permute(0, 4, 1, 2, 3), strict=True):
        for chunk in _chunks(video.shape[2], step):
            source, target = item[:, chunk], item_out[:, chunk]
            if scratch is None:
                _denormalize(source, target)
            else:
                target.copy_(_denormalize(source, scratch[:, : source.shape[1]]))
    if made is out or (out is None and made.is_cpu):
        return made
    if out is None:
        out = torch.empty_strided(*layout(video, torch.float32), dtype=torch.float32, device="cpu")
    return out.copy_(made)


def _key(video: torch.Tensor, *others: Any) -> Key | None:
    return key_of(video)


Make = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@op("frames to uint8", key=_key, autocasts=False)
def to_uint8(
    video: torch.Tensor, make: Make, of_stock: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor | None
) -> torch.Tensor:
    """Returns frames on the CPU.

    Args:
        video: as in `video_to_uint8`.
        make: `video_to_uint8`, as a function of `video` and `out`.
        of_stock: the stock implementation, which returns a new tensor.
        out: memory for frames that are made on the CPU, or None.
    """
    return of_stock(video)


@op("frames to float", key=_key, autocasts=False)
def to_float(
    video: torch.Tensor, make: Make, of_stock: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor | None
) -> torch.Tensor:
    """Returns frames like `to_uint8`, with `video_to_float`."""
    return of_stock(video)


@to_uint8.form("a few frames at a time")
@to_float.form("a few frames at a time")
def in_chunks(
    video: torch.Tensor, make: Make, of_stock: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor | None
) -> torch.Tensor:
    return make(video, out).cpu()


def layout(video: torch.Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns shape and strides, in elements, of the results of the functions here, to allocate a matching `out`.

    `dtype` is fp32 for `video_to_float` and uint8 for `video_to_uint8`. With other strides the order in memory differs,
    and a copy from a device has to rearrange the bytes.
    """
    shape = _shape(video)
    if dtype == torch.float32:
        return shape, _stacked_strides(tuple(video.shape), video.stride())
    return shape, torch.empty(shape, device="meta").stride()


def _shape(video: torch.Tensor) -> tuple[int, ...]:
    batch, channels, frames, height, width = video.shape
    return batch, frames, height, width, channels


def _result(video: torch.Tensor, out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns memory for the frames: `out` if it is on the device of `video`, else new memory there."""
    if out is not None and out.device == video.device:
        return out
    return torch.empty_strided(*layout(video, dtype), dtype=dtype, device=video.device)


def _check(video: torch.Tensor, out: torch.Tensor | None, dtype: torch.dtype) -> None:
    if not video.is_floating_point():
        raise TypeError(f"video is {video.dtype}, not floating")
    if video.dim() != 5:
        raise ValueError(f"video is {tuple(video.shape)}, not (batch, channels, frames, height, width)")
    if out is None:
        return
    if out.dtype != dtype:
        raise TypeError(f"out is {out.dtype}, not {dtype}")
    if out.shape != _shape(video):
        raise ValueError(f"out must be {_shape(video)}, not {tuple(out.shape)}")


def _step(video: torch.Tensor, frames_per_chunk: int | None) -> int:
    if frames_per_chunk is None:
        _, channels, _, height, width = video.shape
        elements = _CPU_CHUNK if video.is_cpu else _CHUNK
        frames_per_chunk = max(1, elements // max(1, channels * height * width))
    if frames_per_chunk < 1:
        raise ValueError(f"frames_per_chunk is {frames_per_chunk}, below 1")
    return min(frames_per_chunk, max(1, video.shape[2]))


def _chunks(frames: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, frames)) for start in range(0, frames, step))


def _buffer(video: torch.Tensor, step: int, dtype: torch.dtype) -> torch.Tensor:
    _, channels, _, height, width = video.shape
    return torch.empty((channels, step, height, width), dtype=dtype, device=video.device)


def _denormalize(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Maps [-1, 1] to [0, 1] in the dtype of `source`, which is that of `out`; two roundings, as in stock."""
    return torch.mul(source, 0.5, out=out).add_(0.5).clamp_(0, 1)


def _clamp(values: torch.Tensor, total: torch.Tensor) -> None:
    """Clamps to [0, 1] in place; adds NaN to `total` if any of `values` is NaN."""
    if not values.is_cpu:
        total += values.clamp_(0, 1).sum()
        return
    # costs as much as a clamp, which decoders have mostly applied already
    lowest, highest = values.aminmax()
    total += lowest.clamp(0, 1)
    if not (lowest >= 0 and highest <= 1):
        values.clamp_(0, 1)


@functools.lru_cache(maxsize=64)
def _stacked_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides, in elements, of stock's `(batch, frames, height, width, channels)` array.

    Two libraries determine them: an elementwise torch operation those of an item, `np.stack` those of the batch. Both
    are queried: torch with meta tensors, numpy with an array of one or two elements along each axis, in a stack of one
    (the new axis is the outermost for any number).
    """
    batch, channels, frames, height, width = shape
    item = torch.empty_strided(shape[1:], strides[1:], device="meta").permute(1, 0, 2, 3)
    item = ((item * 0.5 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1)
    order = sorted(range(4), key=item.stride, reverse=True)
    small = np.empty([min(item.shape[axis], 2) for axis in order], np.uint8).transpose(np.argsort(order))
    stacked = np.stack([small]).strides
    sizes = (batch, frames, height, width, channels)
    return tuple(
        math.prod(size for size, inner in zip(sizes, stacked, strict=True) if size > 1 and inner < stride)
        for stride in stacked
    )
