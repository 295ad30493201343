"""RMS norm over the last axis, as `torch.nn.RMSNorm` computes it, and as diffusers' own class does.

    y = x * rsqrt(mean(x ** 2) + eps) * weight

in fp32, rounded once to the dtype of `x`; by diffusers' norm also before the product with `weight`. For the norm alone
there are forms on CPUs, and elsewhere it is ATen's; on NVIDIA GPUs one kernel makes norm and rotary embedding.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from wan_patches.ops import proof, rope
from wan_patches.ops.dispatch import op
from wan_patches.ops.rope import GRAIN

_SMALL, _SMALL_IN_FP32 = 1 << 21, 6_000_000  # elements below which torch's operations are as fast
_CHUNK = 1 << 19  # elements processed at a time: they stay in the cache from the first operation to the last
_VECTOR = 16  # bytes: as aligned as any norm of ATen's requires


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


@op("RMS norm of diffusers")
def twice_rounded(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Returns the RMS norm of each row of `x` as `diffusers.models.normalization.RMSNorm` computes it.

    Args:
        x: `(..., dim)`, any floating dtype and strides.
        weight: `(dim,)`, any floating dtype; None for ones.

    Returns:
        A new tensor; its dtype is that of `x`, of a half `weight`, or otherwise the promoted one.
    """
    normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    return (normed.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else normed) * weight


@twice_rounded.form("a few tokens at a time", device="cpu", smallest=3 << 20, smallest_in_fp32=1 << 23)
def twice_rounded_in_chunks(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    dim = x.shape[-1]
    step = max(1, _CHUNK // dim)
    for rows, normed in zip(_in_memory(x).view(-1, dim).split(step), _in_memory(out).view(-1, dim).split(step)):
        wide = rows.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        if wide is rows:
            torch.mul(rows, inverse, out=normed)
        else:
            normed.copy_(wide.mul_(inverse))
        if weight is not None:
            normed.mul_(weight)
    return out


@twice_rounded_in_chunks.refuses
def _(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dim() < 2 or x.numel() == 0:
        return "it is not (..., dim) in fp32, bf16 or fp16"
    if not _in_memory(x).is_contiguous():
        return "the rows do not lie next to each other"
    dim = x.shape[-1]
    if dim >= GRAIN:
        return "torch may split a row between threads"
    if weight is not None and (weight.dtype != x.dtype or weight.shape != (dim,) or not weight.is_cpu):
        return "the weight does not fit"
    exact = _is_exact_twice(x.dtype, dim, torch.get_num_threads())
    return None if exact else "no other form is exact with this torch, on this processor"


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """Returns a view of `x` with its rows in the order of memory."""
    axes = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
    return x.permute(*axes, -1)


@functools.lru_cache(maxsize=64)
def _is_exact_twice(dtype: torch.dtype, dim: int, threads: int) -> bool:
    """Tests `twice_rounded_in_chunks` as `_is_exact` tests `in_chunks`."""
    x, weight = _drawn(dtype, dim)
    with torch.no_grad():
        return torch.equal(twice_rounded_in_chunks(x, weight, 1e-6), twice_rounded.reference(x, weight, 1e-6))


@functools.lru_cache(maxsize=64)
def _is_exact(dtype: torch.dtype, dim: int, threads: int, by_default: bool = False, cast: bool = False) -> bool:
    """Tests `in_chunks` on this processor and torch version, where the order of operations may differ.

    by_default: whether `eps` is torch's default, which may also differ.
    """
    x, weight = _drawn(dtype, dim)
    eps = None if by_default else 1e-6
    with torch.no_grad():
        return torch.equal(in_chunks(x, weight, eps, cast), rms_norm.reference(x, weight, eps, cast))


def _drawn(dtype: torch.dtype, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows for more than one chunk, and a weight."""
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    step = max(1, _CHUNK // dim)
    x = torch.randn((1, step + 3, dim), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    weight = torch.randn((dim,), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    return x, weight


# Norm and rotary embedding of queries and keys

_SMALL_ON_GPUS = 1 << 14  # not measured yet


@op("RMS norms and rotary embedding of queries and keys")
def rms_norm_rope_qk(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: tuple[float, float],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies the RMS norm over all heads of queries and of keys, then the rotary embedding.

    Args:
        query, key: `(batch, seq, heads, head_dim)`.
        weights: of both norms, `(heads * head_dim,)` each.
        eps: of both norms.
        cos, sin: as in `wan_patches.ops.rope.apply_rotary_emb`.

    Returns:
        New tensors like `query` and `key`.
    """
    return rope.apply_rotary_emb_qk.reference(*_normed(query, key, weights, eps), cos, sin)


def _normed(
    query: torch.Tensor, key: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], eps: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (
        F.rms_norm(x.flatten(2), weight.shape, weight, e).unflatten(2, x.shape[2:])
        for x, weight, e in zip((query, key), weights, eps)
    )
    return q, k


@rms_norm_rope_qk.form("one kernel each, in the order of ATen's norm", device="cuda", smallest=_SMALL_ON_GPUS)
def in_one(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: tuple[float, float],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    from wan_patches.ops.triton.rms_norm import rms_norm_rope

    q, k = (
        rms_norm_rope(x.flatten(2), weight, e, cos, sin, x.shape[2]) for x, weight, e in zip((query, key), weights, eps)
    )
    return q, k


in_one.confirms(lambda query, key, weights, eps, *tables: all(map(_has_its_order, (query, key), weights, eps)))


def _has_its_order(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    """Whether the kernel has the bits of torch's norm in fp32: in half dtypes most differences are rounded away."""
    from wan_patches.ops.triton.rms_norm import rms_norm_rope

    heads, dim = x.shape[2:]
    rows, weight = proof.rows_that_tell_orders(heads * dim, x.device), weight.float()
    cos = rows.new_ones((1, rows.shape[1], 1, dim // 2))
    found = rms_norm_rope(rows, weight, eps, cos, torch.zeros_like(cos), heads)  # not rotated
    return torch.equal(found.flatten(2), F.rms_norm(rows, weight.shape, weight, eps))


@in_one.refuses
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: tuple[float, float],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> str | None:
    return next(filter(None, (_why_not_in_one(*each, cos, sin) for each in zip((query, key), weights, eps))), None)


def _why_not_in_one(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> str | None:
    """Returns why ATen's norm of `x` is not the one whose order the kernel has, or None."""
    if (reason := rope.why_no_kernel(x, cos, sin)) is not None:
        return reason
    if torch.version.hip is not None or torch.__version__ < (2, 9):  # type: ignore[operator]
        return "torch's norm has another order, before 2.9 or on AMD's GPUs"
    from wan_patches.ops.triton.layer_norm import HAS_GATHER, MAX_DIM, TILE

    if not HAS_GATHER:
        return "Triton is older than 3.3"
    heads, dim = x.shape[2:]
    if heads * dim % TILE or heads * dim > MAX_DIM or TILE % dim:
        return f"the width is not a multiple of {TILE}, up to {MAX_DIM}, or that of a head does not divide it"
    if (x.stride(3), x.stride(2)) != (1, dim):
        return "the channels of a token do not lie next to each other"
    if weight.dtype != x.dtype or weight.shape != (heads * dim,) or weight.device != x.device:
        return "the weight does not fit"
    if not weight.is_contiguous() or eps < torch.finfo(torch.float32).tiny:
        return "the weight does not fit"
    if x.data_ptr() % _VECTOR or weight.data_ptr() % _VECTOR:
        return "ATen takes another norm for what lies unaligned in memory"
    return None


@rms_norm_rope_qk.form("the norms, then the rotation of both", device="cuda", smallest=rope.SMALL_ELSEWHERE)
def one_after_the_other(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: tuple[float, float],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rope.apply_rotary_emb_qk(*_normed(query, key, weights, eps), cos, sin)
