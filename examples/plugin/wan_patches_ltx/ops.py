"""The rotary embedding of LTX-Video, with the bits of diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wan_patches.fidelity import gate, signature


def rotate(stock: Callable[..., torch.Tensor], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of neighbouring channels.

    Args:
        stock: diffusers' function.
        x: queries or keys, `(batch, seq, channels)`, any floating dtype.
        cos, sin: `(1 or batch, seq, channels)`, every value twice in a row; fp32.

    Returns:
        A new tensor like `x`, with the bits of `stock(x, (cos, sin))`.
    """
    if x.is_cpu:
        return rotated(x, cos, sin)
    if torch.compiler.is_compiling() or x.requires_grad:  # the gate looks at values, which are not there yet
        return stock(x, (cos, sin))

    def reference(x: torch.Tensor, *tables: torch.Tensor) -> Any:
        return stock(x, tables)

    return gate("ltx rotary embedding", signature(x, cos, sin), rotated, reference, x, cos, sin)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each product and each sum is rounded in fp32, as stock rounds them, but the turned copy of `x` is never made."""
    out = x.float() * cos
    out[..., 0::2] -= x[..., 1::2].float() * sin[..., 0::2]
    out[..., 1::2] += x[..., 0::2].float() * sin[..., 1::2]
    return out.to(x.dtype)
