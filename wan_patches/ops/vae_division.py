"""Convolutions of a few frames and rows at a time, used if a trial shows that they have the bits of the whole.

On a CPU the summation order of a convolution mostly does not depend on the number of frames and rows, as long as ATen
dispatches both to the same library. Nor does it depend on frames of zeros before the first one. Each convolution is
tested once for each shape.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from wan_patches.ops.vae import bands, least_rows

STEP = 2  # frames at a time in the largest layers, half of stock's
ROWS = 16  # rows upsampled at a time in those layers


class Convolution(Protocol):
    """The parameters of a convolution: `torch.nn.Conv2d`, `Conv3d`, or the stand-in used in a trial."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]


def convolution(conv: Convolution, padding: Any = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the plain convolution, for input that is already concatenated and padded."""
    convolve: Any = F.conv3d if conv.weight.dim() == 5 else F.conv2d
    return lambda x: convolve(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def convolution_of_first(conv: Convolution) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the causal convolution of a first frame, `(batch, channels, 1, height, width)`, already padded.

    All other taps in time see zeros, so that the last one is a convolution of two dimensions.
    """

    def convolve(x: torch.Tensor) -> torch.Tensor:
        weight = conv.weight[:, :, -1].contiguous()
        return F.conv2d(x[:, :, 0], weight, conv.bias, conv.stride[1:], 0, conv.dilation[1:], conv.groups).unsqueeze(2)

    return convolve


_divided: dict[tuple[object, ...], bool] = {}


def _remembered(try_it: Callable[..., bool]) -> Callable[..., bool]:
    """Caches a trial by the convolution's parameters, the shape and the settings that can change the algorithm."""

    @functools.wraps(try_it)
    def ask(conv: Convolution, shape: Sequence[int], dtype: torch.dtype, channels_last: bool, *more: Any) -> bool:
        settings = (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled)
        form = (conv.weight.shape, conv.stride, conv.padding, conv.bias is None)
        key = (try_it, form, tuple(shape), dtype, channels_last, *more, *settings)
        if key not in _divided:
            _divided[key] = try_it(conv, shape, dtype, channels_last, *more)
        return _divided[key]

    return ask


@_remembered
def convolves_divided(conv: Convolution, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> bool:
    """Whether a causal convolution to `(batch, frames, height, width)` has the same bits in steps and bands."""
    batch, frames, height, width = shape
    before, above, beside = (size - 1 for size in conv.kernel_size)
    least = least_rows(batch * conv.in_channels * (before + STEP))
    if height < least:
        return False
    size = (batch, conv.in_channels, before + frames, height + above, width + beside)
    conv, window = _cancelling(conv, size, dtype)
    window = _in_format(window, channels_last)
    convolve = convolution(conv)
    whole = convolve(window)
    edges = bands(height, least) if above else [0, height]
    return _is_rounding(whole) and all(
        torch.equal(
            convolve(_in_format(window[:, :, : before + STEP, top : bottom + above], channels_last)),
            whole[:, :, :STEP, top:bottom],
        )
        for top, bottom in _of_each_size(edges)
    )


@_remembered
def convolves_first(conv: Convolution, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> bool:
    """Whether `convolution_of_first` of one frame, `(batch, height, width)`, has the bits of the causal convolution."""
    batch, height, width = shape
    before, above, beside = (size - 1 for size in conv.kernel_size)
    conv, frame = _cancelling(conv, (batch, conv.in_channels, 1, height + above, width + beside), dtype)
    window = _in_format(F.pad(frame, (0, 0, 0, 0, before, 0)), channels_last)
    whole = convolution(conv)(window)
    del window
    return _is_rounding(whole) and torch.equal(convolution_of_first(conv)(_in_format(frame, channels_last)), whole)


@_remembered
def resizes_divided(conv: Convolution, shape: Sequence[int], dtype: torch.dtype, channels_last: bool, up: bool) -> bool:
    """Whether resampling `(images, channels, height, width)` has the same bits one image at a time, and up in bands."""
    images, channels, height, width = shape
    rows, columns = (2 * min(height, ROWS), 2 * width) if up else (height + 1, width + 1)
    if rows < least_rows(channels * columns):
        return False
    # up: twice as many rows, with zeros above and below them; down: one more row
    size = (2 * height + 2, 2 * width) if up else (height + 1, width + 1)
    conv, frames = _cancelling(conv, (images, channels, *size), dtype)
    if not up:
        convolve, frames = convolution(conv), _in_format(frames, channels_last)
        whole = convolve(frames)
        return _is_rounding(whole) and torch.equal(whole[:1], convolve(frames[:1]))
    frames[..., 0, :] = frames[..., -1, :] = 0
    whole = convolution(conv, conv.padding)(_in_format(frames[..., 1:-1, :], channels_last))
    convolve = convolution(conv, (0, conv.padding[1]))
    return _is_rounding(whole) and all(
        torch.equal(
            convolve(_in_format(frames[:1, :, 2 * top : 2 * bottom + 2], channels_last)),
            whole[:1, :, 2 * top : 2 * bottom],
        )
        for top, bottom in _of_each_size(bands(height, ROWS))
    )


def _in_format(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Returns `x`, contiguous in the given memory format."""
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last if channels_last else torch.contiguous_format)


def _of_each_size(edges: list[int]) -> list[tuple[int, int]]:
    """Returns one band of each height, of the bands with these borders."""
    return list({bottom - top: (top, bottom) for top, bottom in itertools.pairwise(edges)}.values())


def _cancelling(conv: Convolution, shape: Sequence[int], dtype: torch.dtype) -> tuple[Convolution, torch.Tensor]:
    """Returns such a convolution and an input whose products cancel, so that the result consists of rounding errors.

    In bf16 a different summation order changes one result in ten thousand; with cancellation it changes most of them.
    The channels that cancel are chosen at random, and have several magnitudes: some processors sum channels in blocks,
    and two blocks that mirror each other would cancel completely.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    half = conv.in_channels // 2

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    weight, row = random(*conv.weight.shape), random(conv.in_channels, shape[-1])
    lots = torch.randperm(conv.in_channels, generator=generator, device="cpu")
    ones, others = lots[:half], lots[half : 2 * half]
    row[ones] *= (2.0 ** torch.randint(-6, 7, (half, 1), generator=generator, device="cpu")).to(dtype)
    weight[:, others] = -weight[:, ones]
    row[others] = row[ones]
    row[lots[2 * half :]] = 0
    x = row.view(1, shape[1], *(1 for _ in shape[2:-1]), shape[-1]).expand(shape).contiguous()
    bias = None if conv.bias is None else torch.zeros(conv.out_channels, dtype=dtype, device="cpu")
    options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    return SimpleNamespace(weight=weight, bias=bias, **options), x


def _is_rounding(result: torch.Tensor) -> bool:
    """Whether enough of a cancelling result is nonzero: zeros are always equal, so they prove nothing."""
    return bool(4 * result.count_nonzero() > result.numel())
