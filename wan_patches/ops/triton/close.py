"""Norms fused with the operations after them, in one pass over memory: CLOSE, never exact.

Means, variances and all other values are fp32, and rounded to another dtype once, at the store. A row of channels stays
in registers, so its variance is that of the centred values. Multiply-adds are fused explicitly (`tl.fma`), because the
residual sum in the same kernel must not be fused.

Scales, shifts and gates are as in `modulation`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on
from wan_patches.ops.triton.modulation import kind_of, row_of, row_strides
from wan_patches.ops.triton.rope import table_strides

MAX_DIM = 8192  # channels that a program keeps in registers


@triton.jit(do_not_specialize=["seq", "split_index"])  # these change from chunk to chunk
def _layer_norm_modulate(
    x, y, gate, weight, bias, scale, shift, h, out, eps, seq, dim, split_index,
    x_batch, x_token, y_batch, y_token, gate_batch, gate_row, scale_batch, scale_row, shift_batch, shift_row,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // seq).to(tl.int64)
    token = (tl.program_id(0) % seq).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < dim
    at = (batch * seq + token) * dim + place
    value = tl.load(x + batch * x_batch + token * x_token + place, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(y + batch * y_batch + token * y_token + place, mask=inside, other=0.0).to(tl.float32)
        if GATE is not None:
            row = row_of(gate, gate_batch, gate_row, batch, token, split_index, GATE)
            added *= tl.load(row + place, mask=inside, other=0.0)
        rounded = (value + added).to(h.dtype.element_ty)
        tl.store(h + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.div_rn(tl.sum(value, axis=0), dim.to(tl.float32))
    value = tl.where(inside, value - mean, 0.0)
    variance = tl.div_rn(tl.sum(value * value, axis=0), dim.to(tl.float32))
    value *= tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if WEIGHT or BIAS:
        factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) if WEIGHT else 1.0
        term = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32) if BIAS else 0.0
        value = tl.fma(value, factor, term)
    if SCALE is not None:
        row = row_of(scale, scale_batch, scale_row, batch, token, split_index, SCALE)
        factor = 1.0 + tl.load(row + place, mask=inside, other=0.0)
        row = row_of(shift, shift_batch, shift_row, batch, token, split_index, SHIFT)
        term = tl.load(row + place, mask=inside, other=0.0)
        value = tl.fma(value, factor, term)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seq"])
def _rms_norm_rope(
    x, weight, cos, sin, out, eps, seq, x_batch, x_token,
    cos_batch, cos_token, cos_pair, sin_batch, sin_token, sin_pair,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_DIM: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // seq).to(tl.int64)
    token = (tl.program_id(0) % seq).to(tl.int64)
    head = tl.arange(0, TILE_HEADS)[:, None]
    place = tl.arange(0, TILE_DIM)[None, :]
    pair = tl.arange(0, TILE_DIM // 2)[None, :]
    inside = (head < HEADS) & (place < DIM)
    known = pair < DIM // 2
    at = head * DIM + place
    value = tl.load(x + batch * x_batch + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    square = tl.div_rn(tl.sum(tl.sum(value * value, axis=1), axis=0), 1.0 * HEADS * DIM)
    value *= tl.div_rn(1.0, tl.sqrt_rn(square + eps))
    value *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    first, second = tl.split(value.reshape(TILE_HEADS, TILE_DIM // 2, 2))
    cosines = tl.load(cos + batch * cos_batch + token * cos_token + pair * cos_pair, mask=known, other=0.0)
    sines = tl.load(sin + batch * sin_batch + token * sin_token + pair * sin_pair, mask=known, other=0.0)
    turned = tl.join(tl.fma(first, cosines, -(second * sines)), tl.fma(first, sines, second * cosines))
    turned = turned.reshape(TILE_HEADS, TILE_DIM).to(out.dtype.element_ty)
    tl.store(out + (batch * seq + token) * (HEADS * DIM) + at, turned, mask=inside)


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    split_index: int | None = None,
) -> torch.Tensor:
    """Computes `layer_norm(x, weight, bias) * (1 + scale) + shift`.

    Args:
        x: `(batch, seq, dim)`, fp32, bf16 or fp16; any strides with the last one 1; `dim` at most `MAX_DIM`.
        weight, bias: `dim` values of any of these dtypes, contiguous, or None.
        scale, shift: rows, or None for both.
        eps: added to the variance.
        split_index: number of tokens with the first of two rows; None if there are not two.

    Returns:
        A new contiguous tensor of the dtype of `x`.

    Raises:
        ValueError: too many channels, or rows that do not fit.
    """
    return _launch(x, None, None, weight, bias, scale, shift, eps, split_index)[1]


def residual_layer_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    split_index: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the residual sum `h = x + y * gate`, and `layer_norm_modulate(h, ...)`.

    Args:
        x, y: `(batch, seq, dim)`, as in `layer_norm_modulate`, each with its own dtype.
        gate: rows, or None for no gate.
        weight, bias, scale, shift, eps, split_index: as in `layer_norm_modulate`.

    Returns:
        `h`, rounded to the dtype of `x` with exactly the bits of `gated_residual` (of `x + y` without a gate), and its
        norm, in the dtype of `x`; both contiguous.
    """
    return _launch(x, y, gate, weight, bias, scale, shift, eps, split_index)


def rms_norm_rope(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> torch.Tensor:
    """Applies the RMS norm across all heads, then the rotary embedding of each.

    Args:
        x: `(batch, seq, heads * head_dim)`, fp32, bf16 or fp16; any strides with the last one 1; at most `MAX_DIM`
            channels; `head_dim` is even.
        weight: `heads * head_dim` values of any of these dtypes, contiguous.
        eps: added to the mean square.
        cos, sin: `(1 or batch, seq, 1, head_dim / 2)`, fp32, any strides.
        heads: number of heads.

    Returns:
        `(batch, seq, heads, head_dim)`, a new contiguous tensor of the dtype of `x`.
    """
    batch, seq, channels = x.shape
    if channels > MAX_DIM:
        raise ValueError(f"{channels} channels, at most {MAX_DIM}")
    dim = channels // heads
    out = torch.empty((batch, seq, heads, dim), dtype=x.dtype, device=x.device)
    tile_heads, tile_dim = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    launch: Any = _rms_norm_rope[(batch * seq,)]
    with launching_on(x.device):
        launch(
            x, weight, cos, sin, out, eps, seq, *x.stride()[:2], *table_strides(cos), *table_strides(sin),
            HEADS=heads, DIM=dim, TILE_HEADS=tile_heads, TILE_DIM=tile_dim,
            num_warps=_warps(tile_heads * tile_dim), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _launch(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    split_index: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seq, dim = x.shape
    if dim > MAX_DIM:
        raise ValueError(f"{dim} channels, at most {MAX_DIM}")
    out = torch.empty((batch, seq, dim), dtype=x.dtype, device=x.device)
    h = out if y is None else torch.empty_like(out)
    kinds = {
        name: None if rows is None else kind_of(rows, seq, split_index)
        for name, rows in (("GATE", gate), ("SCALE", scale), ("SHIFT", shift))
    }
    given = [x if tensor is None else tensor for tensor in (y, gate, weight, bias, scale, shift)]
    strides = [stride for rows in (gate, scale, shift) for stride in ((0, 0) if rows is None else row_strides(rows))]
    block = triton.next_power_of_2(dim)
    launch: Any = _layer_norm_modulate[(batch * seq,)]
    with launching_on(x.device):
        launch(
            x, *given, h, out, eps, seq, dim, split_index or 0, *x.stride()[:2], *given[0].stride()[:2], *strides,
            RESIDUAL=y is not None, WEIGHT=weight is not None, BIAS=bias is not None, **kinds, BLOCK=block,
            num_warps=_warps(block), enable_fp_fusion=False,
        )  # fmt: skip
    return h, out


def _warps(block: int) -> int:
    """Returns the warps for sixteen values per thread, few enough to keep all arrays in registers."""
    return max(1, min(16, block // 512))
