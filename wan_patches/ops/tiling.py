"""Blending of overlapping tiles, which the tiled paths of autoencoders apply row by row.

Row `i` of an overlap of `n` rows (or column, along the width)::

    second[i] = first[i - n] * (1 - i / n) + second[i] * (i / n)

The weights are Python floats, which are rounded to fp32 when combined with tensors of fp32 or less. Each product and
the sum are rounded to the dtype of the tiles (no fused multiply-add), in stock's order of arithmetic.
"""

from __future__ import annotations

import functools
import math

import torch

from wan_patches.ops.dispatch import ACCELERATOR, op
from wan_patches.patching import tally

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_CHUNK = 1 << 19  # elements processed at a time on CPUs: little scratch, and few calls
_FEW = {-2: 8, -1: 16}  # rows and columns; below this, converting those of half dtypes costs more than it saves


def blend(first: torch.Tensor, second: torch.Tensor, extent: int, dim: int) -> torch.Tensor:
    """Blends the end of a tile into the beginning of the next, in place.

    Args:
        first: the tile above or to the left, `(batch, channels, frames, height, width)`, of a dtype in `DTYPES`.
        second: the tile below or to the right, like `first` except along `dim`, in separate memory; modified in place.
        extent: number of overlapping rows or columns; limited to the size of both tiles.
        dim: -2, along the height, or -1, along the width.

    Returns:
        `second`. EXACT: the bits of the row by row assignment (`cross_fade`).
    """
    extent = min(first.shape[dim], second.shape[dim], extent)
    if extent <= 0 or second.numel() == 0:
        return second
    tail = first.narrow(dim, first.shape[dim] - extent, extent)
    head = second.narrow(dim, 0, extent)
    if not head.is_cpu:
        head.copy_(cross_fade(tail, head, dim))
    elif (reason := _reason_against(head, dim)) is not None:
        head.copy_(cross_fade.stock(reason, tail, head, dim))
    else:
        tally.count(cross_fade.name, "a few frames at a time, in place")
        chunked(tail, head, dim)
    return second


def _reason_against(head: torch.Tensor, dim: int) -> str | None:
    """Why such an overlap uses the plain formulation on CPUs, or None."""
    if head.dtype != torch.float32 and head.shape[dim] < _FEW[dim]:
        return "it is the fastest for so few rows or columns of a half dtype"
    return None if _is_exact(head.dtype) else "no other is exact on this processor"


@op("tile blend")
def cross_fade(tail: torch.Tensor, head: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns a blended overlap, a new tensor like `head`. Row by row, in stock's order of arithmetic."""
    out, extent = torch.empty_like(head), head.shape[dim]
    for i in range(extent):
        row = tail.select(dim, i) * (1 - i / extent) + head.select(dim, i) * (i / extent)
        out.select(dim, i).copy_(row)
    return out


@cross_fade.form("all rows at once", device=ACCELERATOR)
def vectorised(tail: torch.Tensor, head: torch.Tensor, dim: int) -> torch.Tensor:
    """Blends all rows at once into a new tensor; the form for accelerators."""
    falling, rising = _weights(head, dim)
    return (tail * falling).to(head.dtype) + (head * rising).to(head.dtype)


def chunked(tail: torch.Tensor, head: torch.Tensor, dim: int) -> None:
    """Blends into `head`, a few frames at a time, in rows as long as possible; the CPU form."""
    batch, channels, frames, height, width = head.shape
    falling, rising = (weights.expand(height, width).contiguous() for weights in _weights(head, dim))
    step = min(frames, max(1, _CHUNK // math.prod((batch, channels, height, width))))
    products = head.new_empty((2, batch, channels, step, height, width))
    scratch = None if head.dtype == falling.dtype else torch.empty_like(products[0], dtype=falling.dtype)
    for start in range(0, frames, step):
        chunk = slice(start, start + step)
        faded, risen = (
            _product(part[:, :, chunk], weights, out, scratch)
            for part, weights, out in ((tail, falling, products[0]), (head, rising, products[1]))
        )
        torch.add(faded, risen, out=head[:, :, chunk])


def _product(
    part: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor | None
) -> torch.Tensor:
    """Writes `part * weights` to the beginning of `out`, through `scratch` if the dtypes differ."""
    out = out[:, :, : part.shape[2]]
    if scratch is None:
        return torch.mul(part, weights, out=out)
    return out.copy_(scratch[:, :, : part.shape[2]].copy_(part).mul_(weights))


def _weights(head: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights of both tiles: fp32, rounded from doubles, along `dim` of `(height, width)`."""
    steps = torch.arange(head.shape[dim], dtype=torch.float64, device=head.device)
    steps = steps.view((-1, 1) if dim == -2 else (1, -1))
    # a tensor, because some devices divide by a number by multiplying with its inverse
    rising = steps / torch.full_like(steps, head.shape[dim])
    return (1 - rising).to(torch.float32), rising.to(torch.float32)


@functools.lru_cache(maxsize=len(DTYPES))
def _is_exact(dtype: torch.dtype) -> bool:
    """Tests `chunked` on this processor against the plain formulation."""
    if dtype not in DTYPES:
        return False
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    for dim, shape in ((-2, (1, 2, 3, 11, 37)), (-1, (1, 2, 3, 5, 21))):
        tail, head = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype) for _ in "ab"
        )
        expected = cross_fade.reference(tail, head, dim)
        chunked(tail, head, dim)
        if not torch.equal(head, expected):
            return False
    return True
