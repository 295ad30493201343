"""RMS norm over channels and SiLU of Wan's video autoencoder: the steps after the reduction, in one memory pass."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on

if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter has no device libraries

    @triton.jit
    def _exp(x):
        return tl.exp(x)

else:
    from triton.language.extra import libdevice

    @triton.jit
    def _exp(x):
        return libdevice.exp(x)  # the function that ATen calls; `tl.exp` is an approximation


_BLOCK = 1024  # eight bf16 values, 16 bytes, for each of 128 threads
_CHANNELS = 8  # of a program, which reads their common denominators once


@triton.jit
def _kernel(
    x, length, gamma, bias, out, last, scale, size, width, channels, groups, first,
    x_batch, x_channel, x_frame, l_batch, l_frame, out_batch, out_channel, out_frame, out_row,
    last_batch, last_channel, last_frame,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // groups).to(tl.int64)
    frame = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    pixel = (place // width) * out_row + place % width
    dtype = out.dtype.element_ty

    divisors = length + batch * l_batch + frame * l_frame
    divisor = tl.load(divisors + place, mask=inside, other=1.0).to(tl.float32)
    divisor = tl.where(divisor < 1e-12, 1e-12, divisor).to(length.dtype.element_ty).to(tl.float32)  # NaN stays
    start = (tl.program_id(1) % groups) * CHANNELS
    for i in range(tl.minimum(CHANNELS, channels - start)):
        channel = start + i
        source = x + batch * x_batch + channel.to(tl.int64) * x_channel + frame * x_frame
        value = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        # rounded after every operation, as in stock
        value = tl.div_rn(value, divisor).to(dtype).to(tl.float32)
        value = (value * scale).to(dtype).to(tl.float32)
        value = (value * tl.load(gamma + channel).to(tl.float32)).to(dtype).to(tl.float32)
        shift = tl.load(bias + channel).to(tl.float32) if HAS_BIAS else 0.0
        value = (value + shift).to(dtype).to(tl.float32)  # also without a bias: -0 becomes 0
        if SILU:
            value = tl.div_rn(value, 1.0 + _exp(-value))
        target = out + batch * out_batch + channel.to(tl.int64) * out_channel + frame * out_frame
        tl.store(target + pixel, value.to(dtype), mask=inside)
        if frame >= first:
            copy = last + batch * last_batch + channel.to(tl.int64) * last_channel + (frame - first) * last_frame
            tl.store(copy + place, value.to(dtype), mask=inside)


def norm_silu(
    x: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    last: torch.Tensor | None = None,
    *,
    silu: bool = True,
) -> None:
    """Writes `silu(x / max(length, 1e-12) * scale * gamma + bias)`, rounded to the dtype of `x` after each operation.

    Args:
        x: `(batch, channels, frames, height, width)`, where each frame of a channel is contiguous; fp32, bf16, fp16.
        length: `(batch, 1, frames, height, width)`, contiguous; the dtype of `x` or fp32.
        scale: a number.
        gamma: `channels` values, contiguous.
        bias: like `gamma`; None for zero.
        out: like `x`; the pixels of a row are adjacent.
        last: gets the last frames of the result, too: like `out`, with adjacent rows; or None.
        silu: False omits SiLU.
    """
    batch, channels, frames, height, width = x.shape
    size, groups = height * width, -(-channels // _CHANNELS)
    kept, strides = (out, (0, 0, 0)) if last is None else (last, last.stride()[:3])
    first = frames if last is None else frames - last.shape[2]
    launch: Any = _kernel[-(-size // _BLOCK), batch * groups, frames]
    with launching_on(x.device):
        launch(
            x, length, gamma, gamma if bias is None else bias, out, kept,
            scale, size, width, channels, groups, first,
            *x.stride()[:3], length.stride(0), length.stride(2), *out.stride()[:4], *strides,
            HAS_BIAS=bias is not None, SILU=silu, CHANNELS=_CHANNELS, BLOCK=_BLOCK,
            num_warps=4, enable_fp_fusion=False,  # product and sum are rounded separately
        )  # fmt: skip
