"""RMS norm over the last axis, as `torch.nn.RMSNorm` computes it for half dtypes on CPUs.

    y = x * rsqrt(mean(x ** 2) + eps) * weight

in fp32, rounded once to the dtype of `x`. On accelerators the reduction, and therefore the norm, remains ATen's.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from wan_patches.ops.dispatch import op

_SMALL, _SMALL_IN_FP32 = 1 << 21, 6_000_000  # elements below which torch's operations are as fast
_CHUNK = 1 << 19  # elements processed at a time: they stay in the cache from the first operation to the last


@op("RMS norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, cast: bool = False) -> torch.Tensor:
    """Returns the RMS norm of each row of `x`.

    Args:
        x: `(batch, seq, dim)`, any floating dtype and strides.
        weight: `(dim,)`, in the dtype of `x`; None for ones.
        eps: None for torch's default.
        cast: whether stock casts `x` to fp32 and the result back, around the norm.

    Returns:
        A new tensor.
    """
    if cast:
        return F.rms_norm(x.float(), x.shape[-1:], weight, eps).type_as(x)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@rms_norm.form("a few tokens at a time", device="cpu", smallest=_SMALL, smallest_in_fp32=_SMALL_IN_FP32)
def in_chunks(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, cast: bool = False) -> torch.Tensor:
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    batch, seq, dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = None if weight is None else weight.float()
    step = max(1, _CHUNK // dim)
    for b in range(batch):
        for start in range(0, seq, step):
            rows = x[b, start : start + step].float()
            normed = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True).add_(eps))
            out[b, start : start + step].copy_(normed if wide is None else normed.mul_(wide))
    return out


@in_chunks.refuses
def _(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, cast: bool = False) -> str | None:
    if x.dim() != 3 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "it is not (batch, seq, dim) in fp32, bf16 or fp16"
    batch, seq, dim = x.shape
    if x.stride(2) != 1 or x.stride(1) < dim or (batch > 1 and x.stride(0) < seq * x.stride(1)):
        return "the result would lie in another order in memory"
    if weight is not None and (weight.dtype != x.dtype or weight.shape != (dim,) or not weight.is_cpu):
        return "the weight does not fit"
    exact = _is_exact(x.dtype, dim, torch.get_num_threads(), eps is None, cast)
    return None if exact else "no other form is exact with this torch, on this processor"


@functools.lru_cache(maxsize=64)
def _is_exact(dtype: torch.dtype, dim: int, threads: int, by_default: bool = False, cast: bool = False) -> bool:
    """Tests `in_chunks` on this processor and torch version, where the order of operations may differ.

    by_default: whether `eps` is torch's default, which may also differ.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    step = max(1, _CHUNK // dim)
    x = torch.randn((1, step + 3, dim), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    weight = torch.randn((dim,), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    eps = None if by_default else 1e-6
    with torch.no_grad():
        return torch.equal(in_chunks(x, weight, eps, cast), rms_norm.reference(x, weight, eps, cast))
