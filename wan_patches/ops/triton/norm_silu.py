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


@triton.jit
def _kernel(
    x, denominator, gamma, bias, out, scale, size, channels, frames,
    x_batch, x_channel, x_frame, d_batch, d_frame, out_batch, out_channel, out_frame,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) % channels
    batch = (tl.program_id(1) // channels).to(tl.int64)
    frame = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    dtype = out.dtype.element_ty

    row = x + batch * x_batch + channel.to(tl.int64) * x_channel + frame * x_frame
    value = tl.load(row + place, mask=inside, other=0.0).to(tl.float32)
    divisor = tl.load(denominator + batch * d_batch + frame * d_frame + place, mask=inside, other=1.0).to(tl.float32)
    # rounded after every operation, as in stock
    value = tl.div_rn(value, divisor).to(dtype).to(tl.float32)
    value = (value * scale).to(dtype).to(tl.float32)
    value = (value * tl.load(gamma + channel).to(tl.float32)).to(dtype).to(tl.float32)
    shift = tl.load(bias + channel).to(tl.float32) if HAS_BIAS else 0.0
    value = (value + shift).to(dtype).to(tl.float32)  # also without a bias: -0 becomes 0
    if SILU:
        value = tl.div_rn(value, 1.0 + _exp(-value))
    row = out + batch * out_batch + channel.to(tl.int64) * out_channel + frame * out_frame
    tl.store(row + place, value.to(dtype), mask=inside)


def norm_silu(
    x: torch.Tensor,
    denominator: torch.Tensor,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool = True,
) -> torch.Tensor:
    """Computes `silu(x / denominator * scale * gamma + bias)`, rounded to the dtype of `x` after each operation.

    Args:
        x: `(batch, channels, frames, height, width)`, where each frame of a channel is contiguous; fp32, bf16, fp16.
        denominator: `(batch, 1, frames, height, width)`, contiguous; the dtype of `x` or fp32.
        scale: a number.
        gamma: `channels` values, contiguous.
        bias: like `gamma`; None for zero.
        silu: False omits SiLU.

    Returns:
        A new tensor, in the memory order of `x`.
    """
    batch, channels, frames, height, width = x.shape
    out = torch.empty_like(x)
    size = height * width
    grid = (triton.cdiv(size, _BLOCK), batch * channels, frames)
    launch: Any = _kernel[grid]
    with launching_on(x.device):
        launch(
            x, denominator, gamma, gamma if bias is None else bias, out, scale, size, channels, frames,
            *x.stride()[:3], denominator.stride(0), denominator.stride(2), *out.stride()[:3],
            HAS_BIAS=bias is not None, SILU=silu, BLOCK=_BLOCK,
            num_warps=4, enable_fp_fusion=False,  # product and sum are rounded separately
        )  # fmt: skip
    return out
