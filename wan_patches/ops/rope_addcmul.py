"""Rotary embedding of pairs half a head apart by `addcmul`, as in LTX 2.

    y_first  = addcmul(first * cos, -sin, second)
    y_second = addcmul(second * cos, sin, first)

in fp32, rounded once to the dtype of `x`. Whether `addcmul` rounds its product is ATen's affair: forms call it as well.
"""

from __future__ import annotations

import functools

import torch

from wan_patches.ops import rope
from wan_patches.ops.dispatch import op

_SMALL, _SMALL_IN_FP32 = 1 << 22, 1 << 24  # elements below which stock's operations are as fast on CPUs
_VECTOR = 16  # numbers computed together by ATen's vector code, at most


@op("rotary embedding by addcmul")
def apply_rotary_emb_by_addcmul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of channels `i` and `i + head_dim / 2`.

    Args:
        x: queries or keys, `(batch, seq, heads, head_dim)`, any floating dtype and strides.
        cos, sin: `(batch, seq, heads, head_dim / 2)`, fp32.

    Returns:
        A new tensor like `x`.
    """
    return _rotated(x.float(), cos, sin).to(x.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Computes in fp32; `out`: memory for the result."""
    halves, cos, sin = x.unflatten(-1, (2, -1)), cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = torch.mul(halves, cos, out=None if out is None else out.unflatten(-1, (2, -1)))
    turned[..., :1, :].addcmul_(-sin, halves[..., 1:, :])
    turned[..., 1:, :].addcmul_(sin, halves[..., :1, :])
    return turned.flatten(-2)


@apply_rotary_emb_by_addcmul.form(
    "a few tokens at a time", device="cpu", smallest=_SMALL, smallest_in_fp32=_SMALL_IN_FP32
)
def in_chunks(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    batch, seq, heads, dim = x.shape
    step = rope.tokens_per_chunk(seq, heads * dim // 2)
    out = torch.empty_like(x)
    wide, turned = torch.empty((2, step, heads, dim), dtype=torch.float32, device="cpu")
    for b in range(batch):
        for start in range(0, seq, step):
            start = min(start, seq - step)  # the last chunk overlaps, so that all have the same size
            chunk = slice(start, start + step)
            if x.dtype == torch.float32:
                _rotated(x[b, chunk], cos[b, chunk], sin[b, chunk], out[b, chunk])
            else:
                _rotated(wide.copy_(x[b, chunk]), cos[b, chunk], sin[b, chunk], turned)
                out[b, chunk].copy_(turned)
    return out


@in_chunks.refuses
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    if x.dim() != 4 or x.dtype not in rope.DTYPES or x.numel() == 0 or not x.is_contiguous():
        return "the queries are not (batch, seq, heads, head_dim), or of another dtype"
    if x.shape[3] % (2 * _VECTOR):
        return "the head dimension is no multiple of 32"
    if any(table.shape != (*x.shape[:3], x.shape[3] // 2) or table.dtype != torch.float32 for table in (cos, sin)):
        return "the tables are not one for each token and head, in fp32"
    exact = _is_exact(x.dtype, x.shape[2], x.shape[3], torch.get_num_threads())
    return None if exact else "no other form is exact for this dtype, this shape and this number of threads"


@functools.lru_cache(maxsize=64)
def _is_exact(dtype: torch.dtype, heads: int, dim: int, threads: int) -> bool:
    """Tests `in_chunks` on this processor, where the border between two threads may lie elsewhere."""
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    chunk = rope.tokens_per_chunk(1 << 30, heads * dim // 2)
    for seq in (1, chunk + 1):
        x, (cos, sin) = random((1, seq, heads, dim)).to(dtype), random((2, 1, seq, heads, dim // 2))
        with torch.no_grad():
            if not torch.equal(in_chunks(x, cos, sin), apply_rotary_emb_by_addcmul.reference(x, cos, sin)):
                return False
    return True
