"""Rotary embedding by a product of complex numbers, as in Lumina, Qwen-Image, Z-Image and AnyFlow.

Pairs of neighbouring channels are the real and the imaginary parts of a number, which is multiplied by a number of
absolute value 1, in single or double precision. ATen rounds both products and their sum separately, but its scalar
code, used for the rest of a row and at the border between two threads, may use fused multiply-adds. A form has stock's
bits only if stock itself needs no scalar code.
"""

from __future__ import annotations

import functools

import torch

from wan_patches.ops import rope
from wan_patches.ops.dispatch import SMALL, is_below, op

_SMALL = 5 << 19  # elements below which stock's operations are the fastest on CPUs
_SMALL_IN_SINGLE = 5 << 20  # the same for products in single precision, for which less is cast
_PAIRS = 16  # computed together by ATen's vector code, at most


@op("rotary embedding by complex numbers", autocasts=False)
def apply_complex_rotary_emb(x: torch.Tensor, freqs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiplies pairs of neighbouring channels by complex numbers.

    Args:
        x: queries or keys, `(batch, seq, heads, head_dim)`, any floating dtype and strides.
        freqs: `(1 or batch, seq, 1 or heads, head_dim / 2)`, complex64 or complex128.
        dtype: fp32 or fp64, to which `x` is cast first.

    Returns:
        A new tensor like `x`. The products are computed in the promoted dtype of `dtype` and `freqs`.
    """
    numbers = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * freqs).flatten(-2).type_as(x)


@apply_complex_rotary_emb.form("a few tokens at a time", device="cpu", smallest=_SMALL)
def in_chunks(x: torch.Tensor, freqs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cos, sin = torch.view_as_real(freqs).unbind(-1)
    return rope.multiply_rows(x, cos, sin, _product(freqs, dtype))


@in_chunks.refuses
def _(x: torch.Tensor, freqs: torch.Tensor, dtype: torch.dtype) -> str | None:
    if not freqs.is_complex():
        return "the table is not complex"
    if (reason := rope.why_no_rows(x, freqs)) is not None:
        return reason
    if x.shape[3] % (2 * _PAIRS):
        return "the head dimension is no multiple of 32: stock's own rows have a scalar rest"
    if x.dtype is _product(freqs, dtype).to_real():
        return "nothing is cast, and stock's operations are the fastest"
    if _product(freqs, dtype) is torch.complex64 and is_below(_SMALL_IN_SINGLE, x.numel()):
        return SMALL
    if _has_scalar_rest(x.numel() // 2, torch.get_num_threads()):
        return "stock's threads share a row, whose rounding depends on their number"
    if not _is_exact(x.dtype, freqs.dtype, dtype, *x.shape[2:], torch.get_num_threads()):
        return "no other form is exact for this dtype, this shape and this number of threads"
    return None


def _product(freqs: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(freqs.dtype, dtype.to_complex())


def _has_scalar_rest(pairs: int, threads: int) -> bool:
    """Whether ATen gives a thread a number of pairs that its vector code cannot compute alone."""
    threads = min(threads, -(-pairs // rope.GRAIN))
    return threads > 1 and -(-pairs // threads) % _PAIRS != 0


@functools.lru_cache(maxsize=64)
def _is_exact(
    x_dtype: torch.dtype, freqs_dtype: torch.dtype, dtype: torch.dtype, heads: int, dim: int, threads: int
) -> bool:
    """Tests `in_chunks` on this processor against the plain formulation."""
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    token = heads * dim // 2
    seqs = [1, max(1, rope.GRAIN // token), threads * _PAIRS * -(-rope.GRAIN // token)]
    for seq in seqs:
        x = torch.randn((1, seq, heads, dim), generator=generator, dtype=torch.float32, device="cpu").to(x_dtype)
        freqs = torch.randn((1, seq, 1, dim // 2), generator=generator, dtype=freqs_dtype, device="cpu")
        if not torch.equal(in_chunks(x, freqs, dtype), apply_complex_rotary_emb.reference(x, freqs, dtype)):
            return False
    return True
