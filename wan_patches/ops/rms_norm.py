"""RMS norm over the last axis, as `torch.nn.RMSNorm` computes it.

    y = x * rsqrt(mean(x ** 2) + eps) * weight

in fp32, rounded once to the dtype of `x`. For the norm alone there are forms on CPUs, and elsewhere it is ATen's; on
NVIDIA GPUs one kernel makes norm and rotary embedding.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from wan_patches.ops import proof, rope
from wan_patches.ops.dispatch import op

_SMALL, _SMALL_IN_FP32 = 1 << 21, 6_000_000  # elements below which torch's operations are as fast
_CHUNK = 1 << 19  # elements processed at a time: they stay in the cache from the first operation to the last
_VECTOR = 16  # bytes: as aligned as any norm of ATen's requires


@op("RMS norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    """Returns the RMS norm of each row of `x`.

    Args:
        x: `(batch, seq, dim)`, any floating dtype and strides.
        weight: `(dim,)`, in the dtype of `x`; None for ones.
        eps: None for the machine epsilon of the dtype, as in torch.

    Returns:
        A new tensor.
    """
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@rms_norm.form("a few tokens at a time", device="cpu", smallest=_SMALL, smallest_in_fp32=_SMALL_IN_FP32)
def in_chunks(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    assert eps is not None
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
def _(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> str | None:
    if x.dim() != 3 or eps is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "it is not (batch, seq, dim) in fp32, bf16 or fp16"
    batch, seq, dim = x.shape
    if x.stride(2) != 1 or x.stride(1) < dim or (batch > 1 and x.stride(0) < seq * x.stride(1)):
        return "the result would lie in another order in memory"
    if weight is not None and (weight.dtype != x.dtype or weight.shape != (dim,) or not weight.is_cpu):
        return "the weight does not fit"
    exact = _is_exact(x.dtype, dim, torch.get_num_threads())
    return None if exact else "no other form is exact with this torch, on this processor"


@functools.lru_cache(maxsize=64)
def _is_exact(dtype: torch.dtype, dim: int, threads: int) -> bool:
    """Tests `in_chunks` on this processor and torch version, where the order of operations may differ."""
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    step = max(1, _CHUNK // dim)
    x = torch.randn((1, step + 3, dim), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    weight = torch.randn((dim,), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    with torch.no_grad():
        return torch.equal(in_chunks(x, weight, 1e-6), F.rms_norm(x, (dim,), weight, 1e-6))


# Norm and rotary embedding of queries and keys

_SMALL_ON_GPUS = 1 << 14  # not measured yet
_SAMPLE = 128  # tokens by which the order of a sum is recognised: most have the same bits in any order


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


@in_one.confirms
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: tuple[float, float],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> bool:
    return all(map(_has_its_order, (query, key), weights, eps))


def _has_its_order(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    """Whether the kernel has the bits of torch's norm in fp32: in half dtypes most differences are rounded away."""
    from wan_patches.ops.triton.rms_norm import rms_norm_rope

    heads, dim = x.shape[2:]
    rows = proof.with_random_values(x.new_empty(1, _SAMPLE, heads * dim, dtype=torch.float32))
    no_turn, weight = (rows.new_ones(1, _SAMPLE, 1, dim // 2), rows.new_zeros(1, _SAMPLE, 1, dim // 2)), weight.float()
    found = rms_norm_rope(rows, weight, eps, *no_turn, heads)
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
