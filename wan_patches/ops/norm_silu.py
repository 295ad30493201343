"""RMS norm over channels followed by SiLU, which precedes most convolutions of Wan's video autoencoder.

    silu(x / max(|x|, 1e-12) * scale * gamma + bias), |x| over the channels of each position

Every operation is rounded to the dtype of `x`; for half dtypes, newer diffusers versions compute the quotient in fp32.
EXACT on accelerators means ATen's own reduction for |x|, and for the rest a kernel that rounds at the same points as
ATen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from wan_patches.ops import triton as kernels
from wan_patches.ops.dispatch import Key, key_of, op

Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALL = 1 << 12  # elements below which stock's operations run; not measured yet
_GRID = 65535  # blocks along the second and third axis of a launch


def _key(
    x: torch.Tensor, norm: Norm, scale: float, gamma: torch.Tensor, bias: torch.Tensor | None, in_fp32: bool
) -> Key | None:
    return key_of(x, scale, gamma, bias, in_fp32)


@op("RMS norm + SiLU", key=_key)
def norm_silu(
    x: torch.Tensor, norm: Norm, scale: float, gamma: torch.Tensor, bias: torch.Tensor | None, in_fp32: bool
) -> torch.Tensor:
    """Returns SiLU of the RMS norm of `x` over its channels.

    Args:
        x: `(batch, channels, frames, height, width)`, any strides.
        norm: stock's formulation of the norm, called with `x`, `gamma` and `bias`, on CPUs and where no kernel runs.
        scale, gamma, bias: the norm's parameters: a number; `channels` values; the same or None.
        in_fp32: whether `norm` divides in fp32 if `x` has a half dtype.

    Returns:
        A new tensor like `x`.
    """
    return F.silu(norm(x, gamma, bias), inplace=True)


@norm_silu.form("a kernel after the reduction", device="cuda", smallest=_SMALL)
def by_kernel(
    x: torch.Tensor, norm: Norm, scale: float, gamma: torch.Tensor, bias: torch.Tensor | None, in_fp32: bool
) -> torch.Tensor:
    from wan_patches.ops.triton.norm_silu import norm_silu as kernel

    wide = x.float() if in_fp32 else x
    denominator = wide.norm(2.0, 1, keepdim=True).clamp_min_(1e-12).contiguous()
    return kernel(x, denominator, scale, gamma, bias)


@by_kernel.refuses
def _(
    x: torch.Tensor, norm: Norm, scale: float, gamma: torch.Tensor, bias: torch.Tensor | None, in_fp32: bool
) -> str | None:
    if not kernels.is_usable(x.device):
        return "Triton is not installed"
    if x.dim() != 5 or x.dtype not in _DTYPES or x.stride(-1) != 1 or x.stride(-2) != x.shape[-1]:
        return "the frames do not lie in memory row by row"
    if x.shape[0] * x.shape[1] > _GRID or x.shape[2] > _GRID:
        return "there are too many frames or channels"
    fits = all(part.dtype == x.dtype and part.is_contiguous() for part in (gamma, bias) if part is not None)
    return None if fits else "the weight does not fit"
