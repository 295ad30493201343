"""Rotary embedding with a table value for every channel, in one launch that reads and writes the channels once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on

_TILE = 1024  # elements at a time: eight bf16 values, 16 bytes, for each of 128 threads


@triton.jit
def _kernel(
    x, out, cos_first, cos_second, sin_first, sin_second,
    x_batch, x_token, x_head, x_dim, out_batch, out_token, out_head, out_dim,
    cos_first_batch, cos_first_token, cos_first_head, cos_first_pair,
    cos_second_batch, cos_second_token, cos_second_head, cos_second_pair,
    sin_first_batch, sin_first_token, sin_first_head, sin_first_pair,
    sin_second_batch, sin_second_token, sin_second_head, sin_second_pair,
    HALVES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_DIM: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, TILE_DIM // 2)[None, :]
    x += batch * x_batch + token * x_token
    out += batch * out_batch + token * out_token
    cos_first += batch * cos_first_batch + token * cos_first_token + pair * cos_first_pair
    cos_second += batch * cos_second_batch + token * cos_second_token + pair * cos_second_pair
    sin_first += batch * sin_first_batch + token * sin_first_token + pair * sin_first_pair
    sin_second += batch * sin_second_batch + token * sin_second_token + pair * sin_second_pair
    for start in tl.static_range(0, HEADS, TILE_HEADS):
        head = (start + tl.arange(0, TILE_HEADS)[:, None]).to(tl.int64)
        inside = (head < HEADS) & (pair < DIM // 2)
        if HALVES:
            first = tl.load(x + head * x_head + pair * x_dim, mask=inside, other=0.0)
            second = tl.load(x + head * x_head + (pair + DIM // 2) * x_dim, mask=inside, other=0.0)
        else:  # neighbours are loaded together, 16 bytes at once, and separated afterwards
            place = tl.arange(0, TILE_DIM)[None, :]
            whole = (head < HEADS) & (place < DIM)
            channels = tl.load(x + head * x_head + place * x_dim, mask=whole, other=0.0)
            first, second = tl.split(channels.reshape(TILE_HEADS, TILE_DIM // 2, 2))
        dtype = first.dtype
        first, second = first.to(tl.float32), second.to(tl.float32)
        cos_1 = tl.load(cos_first + head * cos_first_head, mask=inside, other=0.0)
        cos_2 = tl.load(cos_second + head * cos_second_head, mask=inside, other=0.0)
        sin_1 = tl.load(sin_first + head * sin_first_head, mask=inside, other=0.0)
        sin_2 = tl.load(sin_second + head * sin_second_head, mask=inside, other=0.0)
        of_first = (first * cos_1 - second * sin_1).to(dtype)
        of_second = (second * cos_2 + first * sin_2).to(dtype)
        if HALVES:
            tl.store(out + head * out_head + pair * out_dim, of_first, mask=inside)
            tl.store(out + head * out_head + (pair + DIM // 2) * out_dim, of_second, mask=inside)
        else:
            turned = tl.join(of_first, of_second).reshape(TILE_HEADS, TILE_DIM)
            tl.store(out + head * out_head + place * out_dim, turned, mask=whole)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, ...], halves: bool) -> torch.Tensor:
    """Rotates pairs of channels of `x`.

    Each product and each sum is rounded in fp32, and the result once more to the dtype of `x`.

    Args:
        x: `(batch, seq, heads, head_dim)`, fp32, bf16 or fp16; `head_dim` is even; any strides, 16 bytes at a time if
            the last one is 1.
        tables: cosines of the first and of the second channels, then sines, `(1 or batch, seq, 1 or heads, head_dim /
            2)` each, fp32, any strides.
        halves: whether channel `i` is paired with channel `i + head_dim / 2` instead of its neighbour.

    Returns:
        A new tensor in the memory order of `x`.
    """
    batch, seq, heads, dim = x.shape
    out = torch.empty_like(x)
    tile_dim = triton.next_power_of_2(dim)
    tile_heads = min(triton.next_power_of_2(heads), max(1, _TILE // tile_dim))
    launch: Any = _kernel[(seq, batch)]
    with launching_on(x.device):
        launch(
            x, out, *tables, *x.stride(), *out.stride(), *(stride for table in tables for stride in _strides(table)),
            HALVES=halves, HEADS=heads, DIM=dim, TILE_HEADS=tile_heads, TILE_DIM=tile_dim,
            num_warps=4, enable_fp_fusion=False,  # products and sums are rounded separately
        )  # fmt: skip
    return out


def _strides(table: torch.Tensor) -> tuple[int, ...]:
    """Returns the strides of a table, 0 along axes that it shares."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(table.stride(), table.shape))
