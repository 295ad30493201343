"""Rotary embedding of queries and keys, in one launch that reads and writes each of them once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on

_TILE = 1024  # elements at a time: eight bf16 values, 16 bytes, for each of 128 threads


@triton.jit
def _turned(pairs, cos, sin, HEADS: tl.constexpr, DIM: tl.constexpr):
    # neighbours are loaded together, 16 bytes at once, and separated afterwards
    first, second = tl.split(pairs.reshape(HEADS, DIM // 2, 2))
    first, second = first.to(tl.float32), second.to(tl.float32)
    turned = tl.join(first * cos - second * sin, first * sin + second * cos)
    return turned.reshape(HEADS, DIM).to(pairs.dtype)


@triton.jit
def _kernel(
    q, k, q_out, k_out, cos, sin,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim,
    q_out_batch, q_out_token, q_out_head, q_out_dim, k_out_batch, k_out_token, k_out_head, k_out_dim,
    cos_batch, cos_token, cos_pair, sin_batch, sin_token, sin_pair,
    HAS_K: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_DIM: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, TILE_DIM // 2)[None, :]
    known = pair < DIM // 2
    # one program per token processes all its heads, so its angles are read once
    cosines = tl.load(cos + batch * cos_batch + token * cos_token + pair * cos_pair, mask=known, other=0.0)
    sines = tl.load(sin + batch * sin_batch + token * sin_token + pair * sin_pair, mask=known, other=0.0)
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    q_out += batch * q_out_batch + token * q_out_token
    k_out += batch * k_out_batch + token * k_out_token
    place = tl.arange(0, TILE_DIM)[None, :]
    for start in tl.static_range(0, HEADS, TILE_HEADS):
        head = (start + tl.arange(0, TILE_HEADS)[:, None]).to(tl.int64)
        inside = (head < HEADS) & (place < DIM)
        queries = tl.load(q + head * q_head + place * q_dim, mask=inside, other=0.0)
        if HAS_K:  # before any store, because later loads would have to wait for it
            keys = tl.load(k + head * k_head + place * k_dim, mask=inside, other=0.0)
        queries = _turned(queries, cosines, sines, TILE_HEADS, TILE_DIM)
        tl.store(q_out + head * q_out_head + place * q_out_dim, queries, mask=inside)
        if HAS_K:
            keys = _turned(keys, cosines, sines, TILE_HEADS, TILE_DIM)
            tl.store(k_out + head * k_out_head + place * k_out_dim, keys, mask=inside)


def rotate(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotates pairs of neighbouring channels of `q`, and of `k` if given.

    Each product and each sum is rounded in fp32, and the result once more to the dtype of `q`.

    Args:
        q, k: `(batch, seq, heads, head_dim)`, with equal shapes and dtypes (fp32, bf16, fp16); `head_dim` is even; any
            strides, 16 bytes at a time if the last one is 1.
        cos, sin: `(1 or batch, seq, 1, head_dim / 2)`, fp32, any strides.

    Returns:
        New tensors, each in the memory order of its input; None if there is no `k`.
    """
    batch, seq, heads, dim = q.shape
    q_out = torch.empty_like(q)
    k_out = None if k is None else torch.empty_like(k)
    tile_dim = triton.next_power_of_2(dim)
    tile_heads = min(triton.next_power_of_2(heads), max(1, _TILE // tile_dim))
    key, key_out = (q, q_out) if k is None or k_out is None else (k, k_out)
    launch: Any = _kernel[(seq, batch)]
    with launching_on(q.device):
        launch(
            q, key, q_out, key_out, cos, sin,
            *q.stride(), *key.stride(), *q_out.stride(), *key_out.stride(), *table_strides(cos), *table_strides(sin),
            HAS_K=k is not None, HEADS=heads, DIM=dim, TILE_HEADS=tile_heads, TILE_DIM=tile_dim,
            num_warps=4, enable_fp_fusion=False,  # products and sums are rounded separately
        )  # fmt: skip
    return q_out, k_out


def table_strides(table: torch.Tensor) -> tuple[int, int, int]:
    """Returns the strides of the batch, the tokens and the pairs; 0 for the batch if all samples share the table."""
    batch, token, _, pair = table.stride()
    return (batch if table.shape[0] > 1 else 0), token, pair
