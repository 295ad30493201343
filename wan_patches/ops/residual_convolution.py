"""A convolution in three dimensions and the residual after it, as at the end of a block of Wan's video autoencoder.

    conv3d(x, weight, bias) + shortcut, rounded after the bias and after the shortcut

On CUDA, ATen adds the bias of a cuDNN convolution in a pass of its own: a kernel adds both in one.
"""

from __future__ import annotations

import torch

from wan_patches.ops import triton as kernels
from wan_patches.ops.convolution import Convolution
from wan_patches.ops.dispatch import op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRID = 65535  # blocks along the second axis of a launch


@op("convolution + residual")
def residual_convolution(x: torch.Tensor, convolution: Convolution, shortcut: torch.Tensor) -> torch.Tensor:
    """Returns the convolution of `x`, which is already padded, plus `shortcut`.

    Args:
        x: `(batch, channels, frames, height, width)`.
        convolution: its parameters.
        shortcut: like the result, any strides.
    """
    y = convolution(x)
    y += shortcut
    return y


@residual_convolution.form("bias and residual in one kernel", device="cuda")
def by_kernel(x: torch.Tensor, convolution: Convolution, shortcut: torch.Tensor) -> torch.Tensor:
    from wan_patches.ops.triton.residual_convolution import add_bias_and_residual

    bias = convolution.bias
    assert bias is not None
    y = convolution(x, biased=False)
    if not y.is_contiguous():  # cuDNN chose otherwise
        y += bias.view(-1, 1, 1, 1)
        y += shortcut
        return y
    add_bias_and_residual(y, bias, shortcut)
    return y


@by_kernel.refuses
def _(x: torch.Tensor, convolution: Convolution, shortcut: torch.Tensor) -> str | None:
    weight, bias, *_ = convolution
    if bias is None:
        return "there is no bias"
    if (reason := kernels.why_unusable(x.device)) is not None:
        return reason
    if x.dtype not in _DTYPES or any(part.dtype != x.dtype for part in (weight, bias, shortcut)):
        return "the dtypes do not fit"
    if not (bias.is_contiguous() and shortcut.is_contiguous()):
        return "the shortcut is not contiguous"
    if shortcut.shape[0] != x.shape[0] or shortcut.shape[1] != weight.shape[0]:
        return "the shortcut has another shape than the convolution"
    return None if shortcut.shape[0] * shortcut.shape[1] <= _GRID else "there are too many channels"
