"""Rotary embedding whose tables hold a value for every channel, as in diffusers' shared `apply_rotary_emb`.

The two channels of a pair, `first` and `second`, are neighbours, or lie half a head apart. Each has a cosine and a sine
of its own::

    y_first  = first * cos_first - second * sin_first
    y_second = second * cos_second + first * sin_second

Each product and each sum is rounded in the promoted dtype of fp32 and the tables, and the result once more to the dtype
of `x`. Where the two cosines and the two sines of each pair are equal, and pairs are neighbours, this is the op of
`wan_patches.ops.rope`, which is faster on CPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from wan_patches.ops import rope
from wan_patches.ops import triton as kernels
from wan_patches.ops.dispatch import op

_SMALL = 5 << 19  # elements below which stock's operations are the fastest on CPUs


class PairTables(NamedTuple):
    """Cosines and sines, one value per pair, for the first and for the second channels of all pairs."""

    cos_first: torch.Tensor
    cos_second: torch.Tensor
    sin_first: torch.Tensor
    sin_second: torch.Tensor


@op("rotary embedding per channel", autocasts=False)
def apply_rotary_emb_per_channel(x: torch.Tensor, tables: PairTables, halves: bool) -> torch.Tensor:
    """Rotates pairs of channels.

    Args:
        x: queries or keys, `(batch, seq, heads, head_dim)`, any floating dtype and strides.
        tables: broadcastable to `(batch, seq, heads, head_dim / 2)`; usually `(1, seq, 1, head_dim / 2)` in fp32.
        halves: whether channel `i` is paired with channel `i + head_dim / 2` instead of its neighbour.

    Returns:
        A new tensor like `x`.
    """
    first, second = pairs(x.float(), halves)
    cos_first, cos_second, sin_first, sin_second = tables
    of_first = first * cos_first - second * sin_first
    of_second = second * cos_second + first * sin_second
    if halves:
        turned = torch.cat((of_first, of_second), dim=-1)
    else:
        turned = torch.stack((of_first, of_second), dim=-1).flatten(-2)
    return torch.empty_like(x).copy_(turned)


@apply_rotary_emb_per_channel.form("a few tokens at a time", device="cpu", smallest=_SMALL)
def in_chunks(x: torch.Tensor, tables: PairTables, halves: bool) -> torch.Tensor:
    """Computes in fp32 memory for a few tokens, so that only `x` and the result pass through main memory."""
    batch, seq, heads, dim = x.shape
    step = rope.tokens_per_chunk(seq, heads * dim // 2)
    out = torch.empty_like(x)
    turned, products = torch.empty((2, step, heads, dim), dtype=torch.float32, device="cpu")
    first, second = pairs(turned, halves)
    of_first, of_second = pairs(products, halves)
    for b in range(batch):
        cos_1, cos_2, sin_1, sin_2 = (table[b if table.shape[0] > 1 else 0] for table in tables)
        for start in range(0, seq, step):
            start = min(start, seq - step)  # the last chunk overlaps, so that all have the same size
            chunk = slice(start, start + step)
            turned.copy_(x[b, chunk])
            torch.mul(second, sin_1[chunk], out=of_first)
            torch.mul(first, sin_2[chunk], out=of_second)
            first.mul_(cos_1[chunk]).sub_(of_first)
            second.mul_(cos_2[chunk]).add_(of_second)
            out[b, chunk].copy_(turned)
    return out


@in_chunks.refuses
def _(x: torch.Tensor, tables: PairTables, halves: bool) -> str | None:
    if not halves:
        return "neighbouring channels are slow to separate on CPUs"
    return _reason_against(x, tables)


@apply_rotary_emb_per_channel.form("one kernel", device="cuda", smallest=rope.SMALL_ELSEWHERE)
def by_kernel(x: torch.Tensor, tables: PairTables, halves: bool) -> torch.Tensor:
    from wan_patches.ops.triton.rope_per_channel import rotate

    return rotate(x, tables, halves)


@by_kernel.refuses
def _(x: torch.Tensor, tables: PairTables, halves: bool) -> str | None:
    if (reason := kernels.why_unusable(x.device)) is not None:
        return reason
    if (reason := _reason_against(x, tables)) is not None:
        return reason
    batch, _, heads, dim = x.shape
    if batch > rope.GRID or heads * dim > rope.CHANNELS:
        return "the kernel is not for such queries and keys"
    return None if all(table.device == x.device for table in tables) else "the tables are on another device"


def _reason_against(x: torch.Tensor, tables: PairTables) -> str | None:
    """Returns why the forms do not support such queries or keys and such tables, or None."""
    if x.dim() != 4 or x.dtype not in rope.DTYPES or x.shape[3] % 2 or x.numel() == 0:
        return "the queries are not (batch, seq, heads, head_dim), or of another dtype"
    batch, seq, heads, dim = x.shape
    shapes = [(b, seq, h, dim // 2) for b in (1, batch) for h in (1, heads)]
    if any(table.shape not in shapes for table in tables):
        return "the tables are not one for each token"
    return None if all(table.dtype == torch.float32 for table in tables) else "the tables are not fp32"


def pairs(x: torch.Tensor, halves: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns views of the first and of the second channels of all pairs, or of a table's values for them."""
    first, second = x.chunk(2, dim=-1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second
