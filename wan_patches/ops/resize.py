"""Pillow's 8-bit Lanczos resize on any device, followed by the conversion from bytes to [-1, 1].

Pillow resamples one axis at a time. An output pixel is a weighted sum of bytes whose weights, a Lanczos window of three
lobes normalised to sum one, are rounded to 22 fractional bits; the sum is rounded back to a byte between the two passes
(`src/libImaging/Resample.c`). All of that is integer arithmetic, so it has the same bits on every device, and matrix
multiplication settings cannot affect it.

The order of the passes depends on the Pillow version and affects the pixels: `_pass_order` detects it.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch

_BITS = 22  # of a weight's fraction: 32 less 8 for the byte, less 2 for sums outside [0, 1]
_HALF = 1 << (_BITS - 1)
_LOBES = 3.0
_MAX_WEIGHTS = 1 << 18  # per axis; larger tables (images of some 40,000 pixels) are left to Pillow
_MAX_TABLES = 64  # device tables kept; one is a few hundred KiB at most in practice
_CPU_CHUNK = 1 << 22  # elements that stay in the caches between two steps
_CHUNK = 1 << 24  # elements on accelerators: 64 MiB of int32, few launches

_Rule = Callable[[int, int, int, int], bool]

#: Whether the vertical pass comes first, by `(in_height, in_width, out_height, out_width)`.
_RULES: dict[str, _Rule] = {
    "horizontal first": lambda H, W, h, w: False,  # found in Pillow 10.4 to 12.1
    "vertical first for columns": lambda H, W, h, w: H > 100 * W and h < H,  # 12.2
    "vertical first where cheaper": lambda H, W, h, w: h < H and H - h > 2 * (W - w),  # 13.0
}

#: Sizes that distinguish the rules, on both sides of each boundary.
_PROBES = (
    (12, 9, 5, 7),
    (12, 9, 8, 7),
    (13, 9, 8, 7),
    (9, 5, 7, 12),
    (5, 5, 6, 20),
    (9, 12, 7, 5),
    (202, 2, 100, 3),
    (200, 2, 199, 3),
    (203, 2, 204, 5),
)


def supported(in_height: int, in_width: int, out_height: int, out_width: int) -> bool:
    """Whether `lanczos_resize` has the pixels of the installed Pillow for these sizes; cached.

    False for sizes below one, for weights that could overflow 32 bits or need an excessively large table, and for a
    Pillow whose results of a few tiny resizes match none of the known pass orders.
    """
    if min(in_height, in_width, out_height, out_width) < 1:
        return False
    if (in_height, in_width) == (out_height, out_width):
        return True
    axes = [pair for pair in ((in_height, out_height), (in_width, out_width)) if pair[0] != pair[1]]
    return _pass_order() is not None and all(_weights(*pair) is not None for pair in axes)


def lanczos_resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Computes `PIL.Image.resize((width, height), Resampling.LANCZOS)` of 8-bit images (modes L and RGB).

    Never waits for the device, except once to upload the weights of each new pair of sizes. Extra memory is bounded by
    some 100 MiB, or by a few frames if one frame is larger than that.

    Args:
        images: uint8, `(images, in_height, in_width, channels)`, any strides and device.
        height, width: of the result.

    Returns:
        A new contiguous uint8 tensor, `(images, height, width, channels)`, on the device of `images`. EXACT: Pillow's
        bytes.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: `images` is not four-dimensional, or the sizes are not `supported`.
    """
    _check_images(images)
    count, in_height, in_width, channels = images.shape
    if not supported(in_height, in_width, height, width):
        raise ValueError(f"no exact resize from {in_height} x {in_width} to {height} x {width}: use Pillow")
    out = images.new_empty((count, height, width, channels))
    if out.numel() == 0:
        return out
    axes = [axis for axis in ((1, in_height, height), (2, in_width, width)) if axis[1] != axis[2]]
    if not axes:
        return out.copy_(images)
    if len(axes) == 2 and not _vertical_first(in_height, in_width, height, width):
        axes.reverse()
    passes = [(dim, _on_device(images.device, before, after)) for dim, before, after in axes]
    # Pillow's first pass skips rows that the second does not read; without a crop box there are none.
    size, largest = [in_height, in_width], 0
    for dim, _, after in axes:
        size[dim - 1] = after
        largest = max(largest, math.prod(size) * channels)
    step = _frames_per_chunk(images, largest)
    for start in range(0, count, step):
        part = images[start : start + step]
        for dim, table in passes[:-1]:
            part = _resample(part, dim, table, None)
        _resample(part, *passes[-1], out[start : start + step])
    return out


def normalize_uint8(images: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Converts bytes to [-1, 1]: `2 * (value / 255) - 1`, every step rounded to fp32, as diffusers does on the CPU.

    Args:
        images: uint8, `(images, height, width, channels)`, any strides and device.
        out: fp32 `(images, channels, height, width)` on the same device, any strides, written in place.

    Returns:
        `out`, or a new fp32 `(images, channels, height, width)` in channels-last memory, with stock's strides for PIL
        images. EXACT on any device.

    Raises:
        TypeError: a dtype is not as specified.
        ValueError: a shape or a device is not as specified.
    """
    _check_images(images)
    source = images.permute(0, 3, 1, 2)
    if out is None:
        out = torch.empty(images.shape, dtype=torch.float32, device=images.device).permute(0, 3, 1, 2)
    elif out.dtype != torch.float32:
        raise TypeError(f"out is {out.dtype}, not torch.float32")
    elif out.shape != source.shape or out.device != images.device:
        raise ValueError(f"out must be {tuple(source.shape)} on {images.device}, not {tuple(out.shape)}")
    step = _frames_per_chunk(images, math.prod(images.shape[1:]))
    for start in range(0, len(images), step):
        chunk = slice(start, start + step)
        if images.is_cpu:
            out[chunk].copy_(source[chunk]).div_(255).mul_(2).sub_(1)
        else:
            out[chunk].copy_(_look_up(images[chunk]).permute(0, 3, 1, 2))
    return out


def _look_up(images: torch.Tensor) -> torch.Tensor:
    """Returns `images` normalised by table lookup, same shape.

    Accelerators divide by a scalar as a multiplication with its reciprocal, which is not exact.
    """
    index = images.reshape(-1).to(torch.int32)
    return _values_on_device(images.device).index_select(0, index).view(images.shape)


def _check_images(images: torch.Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, not torch.uint8")
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (images, height, width, channels)")


def _frames_per_chunk(images: torch.Tensor, frame: int) -> int:
    return max(1, (_CPU_CHUNK if images.is_cpu else _CHUNK) // max(1, frame))


def _resample(images: torch.Tensor, dim: int, table: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """One pass along `dim` of `(images, height, width, channels)`, with a `(2, taps, size)` table."""
    indices, weights = table.unbind(0)
    shape = list(images.shape)
    shape[dim] = table.shape[-1]
    pixels = images.new_empty(shape)
    total = torch.full(shape, _HALF, dtype=torch.int32, device=images.device)
    columns = weights.view(*weights.shape, *[1] * (3 - dim))
    for index, weight in zip(indices.unbind(0), columns.unbind(0), strict=True):
        torch.index_select(images, dim, index, out=pixels)
        total.addcmul_(pixels, weight)  # exact in int32: `_weights` rules out overflow
    total.bitwise_right_shift_(_BITS).clamp_(0, 255)
    return (pixels if out is None else out).copy_(total)


@functools.lru_cache(maxsize=64)
def _weights(size_in: int, size_out: int) -> np.ndarray | None:
    """Returns the source indices and weights of each output pixel of an axis, like Pillow's `precompute_coeffs`.

    Returns:
        int32 `(2, taps, size_out)`: source indices and weights of `_BITS` fractional bits, both padded with zeros. None
        if a sum could overflow 32 bits or the table would be too large.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = _LOBES * stretch
    if (2 * math.ceil(support) + 1) * size_out > _MAX_WEIGHTS:
        return None
    centers = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), size_in)
    indices = first + np.arange((last - first).max())[:, None]
    inside = indices < last
    window = np.where(inside, _lanczos((indices - centers + 0.5) * (1.0 / stretch)), 0.0)
    total = np.zeros(size_out)
    for row in window:  # sequentially, because the order of summation affects the result
        total += row
    real = np.divide(window, total, out=window, where=total != 0)
    weights = (real * (1 << _BITS) + np.where(real < 0, -0.5, 0.5)).astype(np.int64)
    # Every partial sum lies within 255 * sum|weight| + half, so sum|weight| may reach 2.005 * 2**22.
    # Lanczos has at most 1.572 * 2**22 (four pixels enlarged); each table is checked all the same.
    if 255 * int(np.abs(weights).sum(axis=0).max()) + _HALF >= 1 << 31:
        return None
    return np.stack([np.where(inside, indices, 0), weights]).astype(np.int32)


def _lanczos(x: np.ndarray) -> np.ndarray:
    """Returns the windowed sinc, in doubles; zero outside [-3, 3)."""
    return np.where((x >= -_LOBES) & (x < _LOBES), _sinc(x) * _sinc(x / _LOBES), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = x * math.pi
    sine = np.fromiter(map(math.sin, angle.flat), np.float64, angle.size)  # libm's, not numpy's SIMD one
    return np.divide(sine.reshape(x.shape), angle, out=np.ones_like(x), where=x != 0)


def _vertical_first(in_height: int, in_width: int, out_height: int, out_width: int) -> bool:
    order = _pass_order()
    return order is not None and _RULES[order](in_height, in_width, out_height, out_width)


@functools.lru_cache(maxsize=1)
def _pass_order() -> str | None:
    """Returns the key of `_RULES` that the installed Pillow follows for `_PROBES`; takes a few ms, once.

    None if no rule fits: another order, or other arithmetic (forks of Pillow round differently).
    """
    fits = set(_RULES)
    random = np.random.default_rng(0)
    for in_height, in_width, height, width in _PROBES:
        image = random.integers(0, 256, (in_height, in_width), np.uint8)
        pillow = np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.LANCZOS))
        vertical, horizontal = _weights(in_height, height), _weights(in_width, width)
        assert vertical is not None
        assert horizontal is not None
        is_order = {
            True: np.array_equal(_rows(_rows(image, vertical).T, horizontal).T, pillow),
            False: np.array_equal(_rows(_rows(image.T, horizontal).T, vertical), pillow),
        }
        fits = {name for name in fits if is_order[_RULES[name](in_height, in_width, height, width)]}
    return fits.pop() if len(fits) == 1 else None


def _rows(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Computes `_resample` of a `(height, width)` array along its height, without torch and its modes."""
    total = (image[table[0]].astype(np.int32) * table[1][..., None]).sum(axis=0, dtype=np.int32)
    return np.clip((total + _HALF) >> _BITS, 0, 255).astype(np.uint8)


_tables: OrderedDict[tuple[torch.device, int, int], torch.Tensor] = OrderedDict()
_values: dict[torch.device, torch.Tensor] = {}
_lock = threading.Lock()


def _on_device(device: torch.device, size_in: int, size_out: int) -> torch.Tensor:
    """Returns the table of `_weights` on `device`, uploaded on first use. The most recently used are kept."""
    key = (device, size_in, size_out)
    with _lock:
        table = _tables.get(key)
        if table is None:
            weights = _weights(size_in, size_out)
            assert weights is not None, "not supported"
            # A blocking copy: another stream may use the table next.
            table = _tables[key] = torch.from_numpy(weights).to(device)
        _tables.move_to_end(key)
        while len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    return table


def _values_on_device(device: torch.device) -> torch.Tensor:
    """Returns fp32 `(256,)`: the normalised value of each byte, computed on the CPU as in stock."""
    with _lock:
        values = _values.get(device)
        if values is None:
            levels = np.arange(256, dtype=np.uint8).astype(np.float32) / 255.0
            values = _values[device] = (2.0 * torch.from_numpy(levels) - 1.0).to(device)
    return values
