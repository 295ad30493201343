"""A convolution in three dimensions and the lengths of its result over the channels, for the RMS norm that follows.

    y = conv3d(x, weight, bias), |y| over the channels of each position

On CUDA, ATen adds the bias of a cuDNN convolution in a pass of its own, and reads the sum again for the norm: a kernel
adds the squares in ATen's order while it adds the bias.
"""

from __future__ import annotations

import torch

from wan_patches.ops import triton as kernels
from wan_patches.ops.convolution import Convolution
from wan_patches.ops.dispatch import op

Pair = tuple[torch.Tensor, torch.Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANNELS = range(64, 1024, 16)  # for which ATen lets four threads, each with four sums, share a position
_POSITIONS = 128  # and from which on


@op("convolution + lengths")
def normed_convolution(x: torch.Tensor, convolution: Convolution, in_fp32: bool) -> Pair:
    """Returns the convolution of `x`, which is already padded, and its norm over the channels.

    Args:
        x: `(batch, channels, frames, height, width)`.
        convolution: its parameters.
        in_fp32: whether the norm is fp32 if `x` has a half dtype.
    """
    y = convolution(x)
    return y, (y.float() if in_fp32 else y).norm(2.0, 1, keepdim=True)


@normed_convolution.form("bias and lengths in one kernel", device="cuda")
def by_kernel(x: torch.Tensor, convolution: Convolution, in_fp32: bool) -> Pair:
    from wan_patches.ops.triton.normed_convolution import add_bias_and_measure

    assert convolution.bias is not None
    y = convolution(x, biased=False)
    return y, add_bias_and_measure(y, convolution.bias, torch.float32 if in_fp32 else y.dtype)


@normed_convolution.form("norm without a cast", device="cuda")
def by_reduction(x: torch.Tensor, convolution: Convolution, in_fp32: bool) -> Pair:
    y = convolution(x)
    dtype = torch.float32 if in_fp32 else y.dtype
    return y, torch.linalg.vector_norm(y, 2.0, 1, keepdim=True, dtype=dtype)  # casts as it reads


@by_kernel.refuses
def _(x: torch.Tensor, convolution: Convolution, in_fp32: bool) -> str | None:
    weight, bias, stride, dilation, _ = convolution
    if bias is None or not bias.is_contiguous():
        return "there is no bias, or a strided one"
    if (reason := kernels.why_unusable(x.device)) is not None:
        return reason
    if x.dtype not in _DTYPES or weight.dtype != x.dtype or bias.dtype != x.dtype:
        return "the dtypes do not fit"
    if not (x.is_contiguous() and weight.is_contiguous()):
        return "the result would not be contiguous"
    positions = 1
    for size, taps, step, spread in zip(x.shape[2:], weight.shape[2:], stride, dilation):
        positions *= (size - spread * (taps - 1) - 1) // step + 1
    if weight.shape[0] not in _CHANNELS or positions < _POSITIONS or positions % 4:
        return "ATen adds the squares of such a result in another order"
    return None


@by_reduction.refuses
def _(x: torch.Tensor, convolution: Convolution, in_fp32: bool) -> str | None:
    return None if in_fp32 and x.dtype != torch.float32 else "nothing is cast"
