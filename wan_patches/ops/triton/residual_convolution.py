"""What follows a convolution of Wan's video autoencoder, bias and residual, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on

_BLOCK = 1024  # eight bf16 values, 16 bytes, for each of 128 threads


@triton.jit
def _add(y, bias, shortcut, out, size, channels, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    start = tl.program_id(1).to(tl.int64) * size
    dtype = y.dtype.element_ty
    value = tl.load(y + start + place, mask=inside, other=0.0).to(tl.float32)
    term = tl.load(bias + tl.program_id(1) % channels).to(tl.float32)
    value = (value + term).to(dtype).to(tl.float32)  # rounded after every operation, as in stock
    value += tl.load(shortcut + start + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + place, value.to(dtype), mask=inside)


def add_bias_and_residual(y: torch.Tensor, bias: torch.Tensor, shortcut: torch.Tensor) -> None:
    """Computes `y += bias; y += shortcut` in place.

    Args:
        y, shortcut: `(batch, channels, frames, height, width)`, contiguous; fp32, bf16, fp16.
        bias: `channels` values of the same dtype, contiguous.
    """
    batch, channels = y.shape[:2]
    size = y[0, 0].numel()
    launch: Any = _add[-(-size // _BLOCK), batch * channels]
    with launching_on(y.device):
        out = y.view_as(y)  # another argument, because traffic is counted by arguments
        launch(y, bias, shortcut, out, size, channels, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False)
