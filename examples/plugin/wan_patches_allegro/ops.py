"""The rotary embedding of Allegro, with the bits of diffusers' own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wan_patches.ops.dispatch import Key, key_of, op

Tables = tuple[tuple[torch.Tensor, torch.Tensor], ...]
Positions = tuple[torch.Tensor, ...]
Rotation = Callable[[torch.Tensor, Tables, Positions], torch.Tensor]


def _key(x: torch.Tensor, tables: Tables, positions: Positions, stock: Rotation) -> Key | None:
    return key_of(x, tables, positions)


@op("Allegro rotary embedding", key=_key)
def rotary_embedding(x: torch.Tensor, tables: Tables, positions: Positions, stock: Rotation) -> torch.Tensor:
    """Rotates the channels of each axis (time, height, width) by themselves, in pairs half of them apart.

    Args:
        x: queries or keys, `(batch, heads, seq, head_dim)`, any floating dtype.
        tables: cosines and sines of each axis, `(length, head_dim / 3)` each; fp32.
        positions: of each token along each axis, `(1 or batch, seq)`; integers.
        stock: diffusers' function.

    Returns:
        A new tensor like `x`.
    """
    return stock(x, tables, positions)


@rotary_embedding.form("two products, the second added in place")
def rotated(x: torch.Tensor, tables: Tables, positions: Positions, stock: Rotation) -> torch.Tensor:
    """Each product and each sum is rounded in fp32, as stock rounds them, but the turned copy of `x` is never made."""
    return torch.cat([_turned(*axis) for axis in zip(x.chunk(3, dim=-1), tables, positions)], dim=-1)


def _turned(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    cos, sin = (values[position][:, None] for values in table)
    half = x.shape[-1] // 2
    out = x.float() * cos
    out[..., :half] -= x[..., half:].float() * sin[..., :half]
    out[..., half:] += x[..., :half].float() * sin[..., half:]
    return out.to(x.dtype)


def rotate(stock: Rotation, x: torch.Tensor, tables: Tables, positions: Positions) -> torch.Tensor:
    """What patched code calls, with diffusers' function as `stock`."""
    return rotary_embedding(x, tables, positions, stock)
