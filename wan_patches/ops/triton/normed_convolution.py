"""Bias of a convolution, and the lengths of the result over its channels, in one pass and in ATen's order of addition.

ATen's reduction over an axis that is not the fastest (`Reduce.cuh`, `NormTwoOps`): four threads share a position, and
thread t adds the squares of channels 4 j + t. Each has four sums for its channels in turn, every addition fused with
the square; it adds them one after the other. Then thread 0 adds thread 2, 1 adds 3, and 0 adds 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on

_BLOCK = 1024  # eight bf16 values, 16 bytes, for each of 128 threads


@triton.jit
def _squares(y, bias, out, place, inside, size, thread, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the bias to the channels of one of ATen's threads; returns the sum of their squares."""
    total = tl.zeros([BLOCK], tl.float32)
    dtype = y.dtype.element_ty
    for i in range(4):
        part = tl.zeros([BLOCK], tl.float32)
        for step in range(STEPS):
            channel = 16 * step + 4 * i + thread
            row = place + channel * size
            value = tl.load(y + row, mask=inside, other=0.0).to(tl.float32)
            value = (value + tl.load(bias + channel).to(tl.float32)).to(dtype)
            tl.store(out + row, value, mask=inside)
            value = value.to(tl.float32)
            part = tl.fma(value, value, part)
        total = total + part  # the first one is added to zero: a square is never -0
    return total


@triton.jit
def _add(y, bias, out, length, size, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < size
    place = position + tl.program_id(1).to(tl.int64) * (16 * STEPS) * size
    first = _squares(y, bias, out, place, inside, size, 0, STEPS, BLOCK)
    second = _squares(y, bias, out, place, inside, size, 1, STEPS, BLOCK)
    first += _squares(y, bias, out, place, inside, size, 2, STEPS, BLOCK)
    second += _squares(y, bias, out, place, inside, size, 3, STEPS, BLOCK)
    root = tl.sqrt_rn(first + second).to(length.dtype.element_ty)
    tl.store(length + tl.program_id(1).to(tl.int64) * size + position, root, mask=inside)


def add_bias_and_measure(y: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Computes `y += bias` in place, and returns `y.norm(2, 1, keepdim=True)`, a new tensor of `dtype`.

    Args:
        y: `(batch, channels, frames, height, width)`, contiguous, a multiple of 16 channels; fp32, bf16, fp16.
        bias: `channels` values of the same dtype, contiguous.

    Raises:
        ValueError: `y` is not contiguous.
    """
    if not y.is_contiguous():
        raise ValueError("the result of the convolution is not contiguous")
    batch, channels, *places = y.shape
    length = torch.empty((batch, 1, *places), dtype=dtype, device=y.device)
    size = y[0, 0].numel()
    launch: Any = _add[-(-size // _BLOCK), batch]
    with launching_on(y.device):
        out = y.view_as(y)  # another argument, because traffic is counted by arguments
        launch(
            y, bias, out, length, size, STEPS=channels // 16, BLOCK=_BLOCK,
            num_warps=4, enable_fp_fusion=False,  # fused only where ATen's is
        )  # fmt: skip
    return length
