"""RMS norm over channels, and SiLU: what Wan's video autoencoder does before most of its convolutions.

    silu(x / max(|x|, 1e-12) * scale * gamma + bias), |x| over the channels of each position

Every operation is rounded to the dtype of `x`; in half dtypes newer diffusers takes the quotient in fp32. EXACT on
accelerators means ATen's own reduction for |x|, and a kernel for the rest that rounds where ATen does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from wan_patches.fidelity import gate, signature
from wan_patches.ops import triton as kernels

Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRID = 65535  # blocks along the second and third axis of a launch


def norm_silu(
    x: torch.Tensor,
    norm: Norm,
    *,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
) -> torch.Tensor:
    """SiLU of the RMS norm of `x` over its channels.

    Args:
        x: `(batch, channels, frames, height, width)`, any strides.
        norm: the plain formulation of the norm, of `x`, `gamma` and `bias`: runs on CPUs, and wherever no kernel does.
        scale, gamma, bias: of that norm: a number; `channels` values; the same or None.
        in_fp32: whether `norm` divides in fp32 where `x` has a half dtype.

    Returns:
        A new tensor like `x`. EXACT: the bits of SiLU of `norm`; the kernel is behind the first-sight gate.
    """
    if x.is_cpu or not _has_kernel(x, gamma, bias):
        return _plain(x, norm, scale, gamma, bias, in_fp32)
    key = (*signature(x, gamma), scale, bias is None, in_fp32)
    return gate("RMS norm + SiLU", key, _fused, _plain, x, norm, scale, gamma, bias, in_fp32)


def _plain(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
) -> torch.Tensor:
    return F.silu(norm(x, gamma, bias), inplace=True)


def _fused(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
) -> torch.Tensor:
    from wan_patches.ops.triton.norm_silu import norm_silu as kernel

    wide = x.float() if in_fp32 else x
    denominator = wide.norm(2.0, 1, keepdim=True).clamp_min_(1e-12).contiguous()
    return kernel(x, denominator, scale, gamma, bias)


def _has_kernel(x: torch.Tensor, gamma: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        kernels.is_usable(x.device)
        and x.dim() == 5
        and x.dtype in _DTYPES
        and x.stride(-1) == 1
        and x.stride(-2) == x.shape[-1]
        and x.shape[0] * x.shape[1] <= _GRID
        and x.shape[2] <= _GRID
        and all(part.dtype == x.dtype and part.is_contiguous() for part in (gamma, bias) if part is not None)
    )
