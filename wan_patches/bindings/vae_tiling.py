"""Blending of overlapping tiles in autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wan_patches.ops import tiling
from wan_patches.ops.tracing import is_observed
from wan_patches.patching import tally


def blend(
    stock: Callable[..., Any], vae: Any, a: torch.Tensor, b: torch.Tensor, blend_extent: int, dim: int, axes: int
) -> Any:
    """Returns the result of the stock method: `b`, with the end of `a` blended into it in place.

    Tiles of shape `(batch, channels, frames, height, width)`, or without frames if stock's method is for those
    (`axes`), take the fast path in fp32, bf16 or fp16, unless something observes the operations (autograd, a compiler).
    All other tiles fall back to stock.
    """
    if (reason := _reason_against(a, b, blend_extent, dim, axes)) is not None:
        tally.note("tile blend", "", reason)
        return stock(vae, a, b, blend_extent)
    if axes == 4:
        tiling.blend(a.unsqueeze(2), b.unsqueeze(2), blend_extent, dim)
        return b
    return tiling.blend(a, b, blend_extent, dim)


def _reason_against(a: torch.Tensor, b: torch.Tensor, blend_extent: object, dim: int, axes: int) -> str | None:
    """Why these tiles fall back to the stock implementation, or None."""
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if is_observed(a, b) or a.is_meta or b.is_meta:
        return "something looks into the operations on a tile"
    if type(blend_extent) is not int:
        return "the overlap is not a whole number"
    if a.dtype != b.dtype or a.dtype not in tiling.DTYPES or a.device != b.device:
        return "the dtypes or devices of the tiles"
    if a.dim() != axes or b.dim() != axes:
        return f"the tiles do not have {axes} axes"
    if any(sizes[0] != sizes[1] for axis, sizes in enumerate(zip(a.shape, b.shape), -axes) if axis != dim):
        return "the tiles do not fit one another"
    if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr():  # row by row, one row could overwrite another
        return "the tiles share memory"
    if 0 in b.stride():  # stock writes successive rows to the same memory, or raises
        return "elements of a tile are one in memory"
    return None
