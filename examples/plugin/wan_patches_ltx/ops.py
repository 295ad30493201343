"""The rotary embedding of LTX-Video, with the bits of diffusers' own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wan_patches.ops.dispatch import Key, key_of, op

Rotation = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


def _key(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, stock: Rotation) -> Key | None:
    return key_of(x, cos, sin)


@op("LTX rotary embedding", key=_key)
def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, stock: Rotation) -> torch.Tensor:
    """Rotates pairs of neighbouring channels.

    Args:
        x: queries or keys, `(batch, seq, channels)`, any floating dtype.
        cos, sin: `(1 or batch, seq, channels)`, every value twice in a row; fp32.
        stock: diffusers' function.

    Returns:
        A new tensor like `x`.
    """
    return stock(x, (cos, sin))


@rotary_embedding.form("two products, the second added in place")
def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, stock: Rotation) -> torch.Tensor:
    """Each product and each sum is rounded in fp32, as stock rounds them, but the turned copy of `x` is never made."""
    out = x.float() * cos
    out[..., 0::2] -= x[..., 1::2].float() * sin[..., 0::2]
    out[..., 1::2] += x[..., 0::2].float() * sin[..., 1::2]
    return out.to(x.dtype)


def rotate(stock: Rotation, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What patched code calls, with diffusers' function as `stock`."""
    return rotary_embedding(x, cos, sin, stock)
