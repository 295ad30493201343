"""Elementwise operations between attention, feed-forward and norms of a transformer block, one pass over memory each.

Scales, shifts and gates ("rows" below) are fp32, `(1 or batch, rows, dim)`, any strides with the last one 1: one row
for all tokens, one for each token, or two with a `split_index`: the first for the tokens before it, the second for the
rest. Or they are a pair, a row `(1, 1, dim)` and one for each token, `(batch, seq, dim)`, of any of the dtypes, to be
added in fp32. Every operation is rounded in fp32, like ATen's, and the result once more to its own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_BLOCK = 1024  # channels at a time: eight bf16 values, 16 bytes, for each of 128 threads
_TOKENS = 4  # tokens per program, which loads shared rows once


@triton.jit
def load_shared(table, rows, row_stride, place, inside, KIND: tl.constexpr):
    """Loads the row for all tokens twice, or the two rows."""
    if KIND == "sum":
        rows = table
    first = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    rest = first
    if KIND == "two":
        rest = tl.load(rows + row_stride + place, mask=inside, other=0.0)
    return first, rest


@triton.jit
def load_own(shared, rows, row_stride, token, split_index, place, inside, KIND: tl.constexpr):
    """Returns the row of one token; `shared` are the rows that many tokens have."""
    if KIND == "each":
        return tl.load(rows + token * row_stride + place, mask=inside, other=0.0)
    if KIND == "sum":
        return shared[0] + tl.load(rows + token * row_stride + place, mask=inside, other=0.0).to(tl.float32)
    if KIND == "two":
        return tl.where(token < split_index, shared[0], shared[1])
    return shared[0]


@triton.jit
def row_of(rows, batch_stride, row_stride, batch, token, split_index, KIND: tl.constexpr):
    """Returns a pointer to the row of one token."""
    row = batch * batch_stride
    if KIND == "each" or KIND == "sum":
        row += token * row_stride
    if KIND == "two":
        row += (token >= split_index).to(tl.int64) * row_stride
    return rows + row


@triton.jit(do_not_specialize=["seq", "split_index"])  # which change from chunk to chunk
def _modulate(
    normed, scale_table, scale, shift_table, shift, out, seq, dim, split_index,
    scale_batch, scale_row, shift_batch, shift_row,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_dim = place < dim
    scale += batch * scale_batch
    shift += batch * shift_batch
    scales = load_shared(scale_table, scale, scale_row, place, in_dim, SCALE)
    shifts = load_shared(shift_table, shift, shift_row, place, in_dim, SHIFT)
    for i in tl.static_range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        inside = place < tl.where(token < seq, dim, 0)
        at = (batch * seq + token) * dim + place
        factor = 1.0 + load_own(scales, scale, scale_row, token, split_index, place, inside, SCALE)
        term = load_own(shifts, shift, shift_row, token, split_index, place, inside, SHIFT)
        value = tl.load(normed + at, mask=inside, other=0.0) * factor + term
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seq", "split_index"])  # which change from chunk to chunk
def _gated_residual(
    x, y, gate_table, gate, out, seq, dim, split_index, y_batch, y_token, gate_batch, gate_row,
    GATE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_dim = place < dim
    gate += batch * gate_batch
    gates = load_shared(gate_table, gate, gate_row, place, in_dim, GATE)
    for i in tl.static_range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        inside = place < tl.where(token < seq, dim, 0)
        at = (batch * seq + token) * dim + place
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(y + batch * y_batch + token * y_token + place, mask=inside, other=0.0).to(tl.float32)
        value += added * load_own(gates, gate, gate_row, token, split_index, place, inside, GATE)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_and_cast(x, y, out, wide, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    tl.store(out + at, value, mask=inside)
    tl.store(wide + at, value.to(tl.float32), mask=inside)


def modulate(
    normed: torch.Tensor, scale: Rows, shift: Rows, dtype: torch.dtype, split_index: int | None = None
) -> torch.Tensor:
    """Computes `(normed * (1 + scale) + shift).to(dtype)`.

    Args:
        normed: `(batch, seq, dim)`, fp32, contiguous.
        scale, shift: rows (see above), each of its own kind.
        dtype: fp32, bf16 or fp16.
        split_index: number of tokens with the first of two rows; None if there are not two.

    Returns:
        A new tensor of `dtype`, contiguous.
    """
    batch, seq, dim = normed.shape
    out = torch.empty((batch, seq, dim), dtype=dtype, device=normed.device)
    launch: Any = _modulate[_grid(batch, seq, dim)]
    with launching_on(normed.device):
        launch(
            normed, *parts_of(scale), *parts_of(shift), out, seq, dim, split_index or 0,
            *row_strides(scale), *row_strides(shift),
            SCALE=kind_of(scale, seq, split_index), SHIFT=kind_of(shift, seq, split_index),
            TOKENS=_TOKENS, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,  # product and sum are rounded separately
        )  # fmt: skip
    return out


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: Rows, split_index: int | None = None) -> torch.Tensor:
    """Computes `(x.float() + y.float() * gate).to(x.dtype)`.

    Args:
        x: `(batch, seq, dim)`, contiguous; fp32, bf16 or fp16.
        y: like `x`, with its own dtype and any strides with the last one 1.
        gate: rows (see above).
        split_index: number of tokens with the first of two rows; None if there are not two.

    Returns:
        A new tensor like `x`.
    """
    batch, seq, dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch: Any = _gated_residual[_grid(batch, seq, dim)]
    with launching_on(x.device):
        launch(
            x, y, *parts_of(gate), out, seq, dim, split_index or 0, y.stride(0), y.stride(1), *row_strides(gate),
            GATE=kind_of(gate, seq, split_index), TOKENS=_TOKENS, BLOCK=_BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def add_and_cast(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `x + y`, and the same in fp32.

    Args:
        x, y: of one shape and one half dtype, contiguous.

    Returns:
        The sum, rounded to the dtype of `x`, and that rounded sum as fp32; both contiguous.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    launch: Any = _add_and_cast[(triton.cdiv(x.numel(), _BLOCK),)]
    with launching_on(x.device):
        launch(x, y, out, wide, x.numel(), BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False)
    return out, wide


def kind_of(rows: Rows, seq: int, split_index: int | None) -> str:
    """Returns `"one"` row for all tokens, `"each"` its own, `"two"`, or `"sum"` of the first and the second.

    Raises ValueError for other numbers of rows.
    """
    found = parts_of(rows)[1].shape[1]
    if isinstance(rows, tuple) and found == seq and split_index is None:
        return "sum"
    if found == 1:
        return "one"
    if found == (seq if split_index is None else 2):
        return "each" if split_index is None else "two"
    raise ValueError(f"{found} rows for {seq} tokens, and a split_index of {split_index}")


def parts_of(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the row for all tokens, which kernels read only of a sum, and the others."""
    return rows if isinstance(rows, tuple) else (rows, rows)


def row_strides(rows: Rows) -> tuple[int, int]:
    """Returns the strides of the batch and of the rows; 0 for the batch if all samples share the rows."""
    _, rows = parts_of(rows)
    return (rows.stride(0) if rows.shape[0] > 1 else 0), rows.stride(1)


def _grid(batch: int, seq: int, dim: int) -> tuple[int, int, int]:
    return triton.cdiv(seq, _TOKENS), triton.cdiv(dim, _BLOCK), batch
