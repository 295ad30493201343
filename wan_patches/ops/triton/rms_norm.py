"""RMS norm across heads and rotary embedding in one pass, in the order of ATen's CUDA kernel: EXACT.

From torch 2.9 on ATen's RMS norm is a variant of its layer norm (see `layer_norm`): 128 threads, each with four
channels of every 512, now with `squares = fma(x, x, squares)`, and sums of two threads where statistics were united.
The result is `weight * (rsqrt(squares / channels + eps) * x)`, rounded to the dtype of `x`. The rotation follows as in
`rope`: its products and sums are rounded separately. As there, the order was read and compiled, not run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on
from wan_patches.ops.triton.layer_norm import MAX_DIM, TILE, in_vectors
from wan_patches.ops.triton.rope import table_strides


@triton.jit
def _summed(squares):
    """Sums over 128 threads; `(1,)`."""
    squares = squares.reshape(4, 32)
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], (4, 32))
    for i in tl.static_range(5):
        squares += tl.gather(squares, lane ^ (16 >> i), 1)
    squares = tl.sum(tl.where(lane == 0, squares, 0.0), 1)  # adding zeros is exact
    for i in tl.static_range(2):
        halves = tl.split(tl.trans(squares.reshape(2, 2 >> i)))
        squares = halves[0] + halves[1]
    return squares


@triton.jit(do_not_specialize=["seq"])
def _rms_norm_rope(
    x, weight, cos, sin, out, eps, seq, x_batch, x_token,
    cos_batch, cos_token, cos_pair, sin_batch, sin_token, sin_pair,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // seq).to(tl.int64)
    token = (tl.program_id(0) % seq).to(tl.int64)
    pair = tl.arange(0, DIM // 2)[None, :]
    cosines = tl.load(cos + batch * cos_batch + token * cos_token + pair * cos_pair)
    sines = tl.load(sin + batch * sin_batch + token * sin_token + pair * sin_pair)
    x += batch * x_batch + token * x_token
    out += (batch * seq + token) * CHANNELS
    tiles = ()
    for start in tl.static_range(0, CHANNELS, TILE):
        tiles += (tl.load(x + start + tl.arange(0, TILE)),)  # type: ignore[assignment]
    squares = tl.zeros((TILE // 4,), tl.float32)
    for i in tl.static_range(CHANNELS // TILE):
        first, second, third, fourth = in_vectors(tiles[i], TILE)
        squares = tl.fma(first, first, squares)
        squares = tl.fma(second, second, squares)
        squares = tl.fma(third, third, squares)
        squares = tl.fma(fourth, fourth, squares)
    factor = tl.rsqrt(tl.div_rn(_summed(squares), 1.0 * CHANNELS) + eps)
    for i in tl.static_range(CHANNELS // TILE):
        place = i * TILE + tl.arange(0, TILE)
        normed = tl.load(weight + place).to(tl.float32) * (factor * tiles[i].to(tl.float32))
        pairs = normed.to(out.dtype.element_ty).reshape(TILE // DIM, DIM // 2, 2)
        even, odd = tl.split(pairs)
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        turned = tl.join(even * cosines - odd * sines, even * sines + odd * cosines)
        tl.store(out + place, turned.reshape(TILE).to(out.dtype.element_ty))


def rms_norm_rope(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> torch.Tensor:
    """Applies the RMS norm across all heads, then the rotary embedding of each.

    Args:
        x: `(batch, seq, heads * head_dim)`, fp32, bf16 or fp16; any strides with the last one 1; a multiple of `TILE`
            channels, at most `MAX_DIM`; `head_dim` divides `TILE`.
        weight: `heads * head_dim` values of the dtype of `x`, contiguous.
        eps: added to the mean square; a normal number.
        cos, sin: `(1 or batch, seq, 1, head_dim / 2)`, fp32, any strides.
        heads: number of heads.

    Returns:
        `(batch, seq, heads, head_dim)`, a new contiguous tensor of the dtype of `x`.

    Raises:
        ValueError: another number of channels, in all or in a head.
    """
    batch, seq, channels = x.shape
    dim = channels // heads
    if channels % TILE or channels > MAX_DIM or TILE % dim:
        raise ValueError(f"{heads} heads of {dim}, not a multiple of {TILE} channels up to {MAX_DIM}")
    out = torch.empty((batch, seq, heads, dim), dtype=x.dtype, device=x.device)
    launch: Any = _rms_norm_rope[(batch * seq,)]
    with launching_on(x.device):
        launch(
            x, weight, cos, sin, out, eps, seq, *x.stride()[:2], *table_strides(cos), *table_strides(sin),
            CHANNELS=channels, DIM=dim, TILE=TILE,
            num_warps=TILE * x.element_size() // 512, enable_fp_fusion=False,
        )  # fmt: skip
    return out
