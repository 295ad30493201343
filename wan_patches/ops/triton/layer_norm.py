"""Layer norm in one pass, with the operations before and after it, in the order of ATen's CUDA kernel: EXACT.

ATen's `vectorized_layer_norm_kernel`, for aligned rows of a multiple of four channels, gives a row to 128 threads.
Thread `t` takes the channels `4 t` to `4 t + 3` of every 512 and updates mean and sum of squares (Welford), `n` being
the channels it has seen:

    delta = x - mean;   mean = fma(delta, 1 / n, mean);   squares = fma(delta, x - mean, squares)

Then each thread takes in what another one has, in pairs at a distance of 16, 8, 4, 2 and 1 threads within each warp,
and of 2 and 1 warps. In rows of a multiple of 512 channels both have seen the same `count` of channels, and up to 8192
channels the share of each, `count * (1 / (2 * count))`, is 0.5 in fp32 too:

    delta = mean - other_mean
    mean = fma(other_mean, 0.5, mean * 0.5)
    squares = fma(delta * delta * count, 0.5, squares + other_squares)

The result is `rsqrt(squares / channels + eps) * (x - mean)`, times the weight, plus the bias (fused with the product
before it). These multiply-adds are those that nvcc 13.0 contracts in that kernel, alike for sm_80, sm_90 and sm_100;
all other operations are rounded separately. Reciprocals and the division are `rcp.rn` and `div.rn`, and the root is
`rsqrt.approx`; Triton's `rsqrt.approx.ftz` differs from it for subnormal numbers only, which an `eps` precludes.

The order is the same before and after torch 2.9, which added the RMS norm to that kernel. It was read and compiled, not
run: the first-sight gate compares with the GPU's own norm.

Here a thread takes the part of one such thread in fp32 and of two in half dtypes, so that it always loads 16 bytes. A
row stays in registers from load to store. Rows of modulations are as in `modulation`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from wan_patches.ops.triton import launching_on
from wan_patches.ops.triton.modulation import Rows, kind_of, parts_of, row_of, row_strides

TILE = 512  # channels that ATen's threads load together
MAX_DIM = 8192  # channels that a program keeps in registers
HAS_GATHER = hasattr(tl, "gather")  # from Triton 3.3 on


@triton.jit
def in_vectors(tile, TILE: tl.constexpr):
    """Splits a tile into the four channels of each of ATen's threads, in fp32."""
    even, odd = tl.split(tile.to(tl.float32).reshape(TILE // 4, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _updated(mean, squares, value, RECIPROCAL: tl.constexpr):
    """Adds a value to each thread's mean and sum of squares."""
    delta = value - mean
    mean = tl.fma(delta, RECIPROCAL, mean)
    return mean, tl.fma(delta, value - mean, squares)


@triton.jit
def _united(mean, squares, other_mean, other_squares, COUNT: tl.constexpr):
    """Unites means and sums of squares of `COUNT` values each."""
    delta = mean - other_mean
    squares = tl.fma(delta * delta * COUNT, 0.5, squares + other_squares)
    return tl.fma(other_mean, 0.5, mean * 0.5), squares


@triton.jit
def _folded(mean, squares, COUNT: tl.constexpr):
    """Unites 128 threads, each of `COUNT` values; returns mean and sum of squares, `(1,)` each."""
    mean, squares = mean.reshape(4, 32), squares.reshape(4, 32)
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], (4, 32))
    for i in tl.static_range(5):
        place = lane ^ (16 >> i)
        others = tl.gather(mean, place, 1), tl.gather(squares, place, 1)
        mean, squares = _united(mean, squares, others[0], others[1], 1.0 * COUNT * (1 << i))
    # the first lane has followed the order; adding zeros is exact
    mean = tl.sum(tl.where(lane == 0, mean, 0.0), 1)
    squares = tl.sum(tl.where(lane == 0, squares, 0.0), 1)
    for i in tl.static_range(2):
        means = tl.split(tl.trans(mean.reshape(2, 2 >> i)))
        sums = tl.split(tl.trans(squares.reshape(2, 2 >> i)))
        mean, squares = _united(means[0], sums[0], means[1], sums[1], 1.0 * COUNT * (32 << i))
    return mean, squares


@triton.jit
def _row(table, row, place, KIND: tl.constexpr):
    """Loads a part of the row of one token."""
    value = tl.load(row + place).to(tl.float32)
    if KIND == "sum":
        value += tl.load(table + place).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["seq", "split_index"])  # these change from chunk to chunk
def _layer_norm(
    x, y, weight, bias, gate_table, gate, scale_table, scale, shift_table, shift, h, out, eps, seq, split_index,
    gate_batch, gate_row, scale_batch, scale_row, shift_batch, shift_row,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // seq).to(tl.int64)
    token = (tl.program_id(0) % seq).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * DIM
    gate = row_of(gate, gate_batch, gate_row, batch, token, split_index, GATE)
    scale = row_of(scale, scale_batch, scale_row, batch, token, split_index, SCALE)
    shift = row_of(shift, shift_batch, shift_row, batch, token, split_index, SHIFT)
    tiles = ()
    for start in tl.static_range(0, DIM, TILE):
        place = start + tl.arange(0, TILE)
        tile = tl.load(x + row + place)
        if RESIDUAL:
            added = tl.load(y + row + place).to(tl.float32)
            if GATE is not None:
                added *= _row(gate_table, gate, place, GATE)
            tile = (tile.to(tl.float32) + added).to(h.dtype.element_ty)
            tl.store(h + row + place, tile)
        tiles += (tile,)  # type: ignore[assignment]
    mean = tl.zeros((TILE // 4,), tl.float32)
    squares = tl.zeros((TILE // 4,), tl.float32)
    for i in tl.static_range(DIM // TILE):
        first, second, third, fourth = in_vectors(tiles[i], TILE)
        mean, squares = _updated(mean, squares, first, 1.0 / (4 * i + 1))
        mean, squares = _updated(mean, squares, second, 1.0 / (4 * i + 2))
        mean, squares = _updated(mean, squares, third, 1.0 / (4 * i + 3))
        mean, squares = _updated(mean, squares, fourth, 1.0 / (4 * i + 4))
    mean, squares = _folded(mean, squares, DIM // (TILE // 4))
    factor = tl.rsqrt(tl.div_rn(squares, 1.0 * DIM) + eps)
    for i in tl.static_range(DIM // TILE):
        place = i * TILE + tl.arange(0, TILE)
        value = tiles[i].to(tl.float32) - mean
        if BIAS:
            term = tl.load(bias + place).to(tl.float32)
            if WEIGHT:
                value = tl.fma(tl.load(weight + place).to(tl.float32), factor * value, term)
            else:
                value = tl.fma(factor, value, term)
        else:
            value = factor * value
            if WEIGHT:
                value = tl.load(weight + place).to(tl.float32) * value
        if SCALE is not None:
            value = value * (1.0 + _row(scale_table, scale, place, SCALE)) + _row(shift_table, shift, place, SHIFT)
        tl.store(out + row + place, value.to(out.dtype.element_ty))


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: Rows | None,
    shift: Rows | None,
    eps: float,
    split_index: int | None = None,
) -> torch.Tensor:
    """Computes `layer_norm(x.float(), weight, bias) * (1 + scale) + shift`, rounded to the dtype of `x`.

    Args:
        x: `(batch, seq, dim)`, contiguous; fp32, bf16 or fp16; `dim` is a multiple of `TILE`, and at most `MAX_DIM`.
        weight, bias: `dim` values of any of these dtypes, contiguous, or None.
        scale, shift: rows, or None for both.
        eps: added to the variance; a normal number.
        split_index: number of tokens with the first of two rows; None if there are not two.

    Returns:
        A new contiguous tensor like `x`.

    Raises:
        ValueError: another number of channels, or rows that do not fit.
    """
    return _launch(x, None, None, weight, bias, scale, shift, eps, split_index)[1]


def residual_layer_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Rows | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: Rows | None,
    shift: Rows | None,
    eps: float,
    split_index: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the residual sum `h = x + y * gate`, rounded to the dtype of `x`, and `layer_norm_modulate(h, ...)`.

    Args:
        x, y: `(batch, seq, dim)`, as in `layer_norm_modulate`, each with its own dtype.
        gate: rows, or None for no gate.
        weight, bias, scale, shift, eps, split_index: as in `layer_norm_modulate`.

    Returns:
        `h` and its norm, new contiguous tensors like `x`.
    """
    return _launch(x, y, gate, weight, bias, scale, shift, eps, split_index)


def _launch(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: Rows | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: Rows | None,
    shift: Rows | None,
    eps: float,
    split_index: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seq, dim = x.shape
    if dim % TILE or dim > MAX_DIM:
        raise ValueError(f"{dim} channels, not a multiple of {TILE} up to {MAX_DIM}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = out if y is None else torch.empty_like(out)
    kinds = {
        name: None if rows is None else kind_of(rows, seq, split_index)
        for name, rows in (("GATE", gate), ("SCALE", scale), ("SHIFT", shift))
    }
    given = [x if tensor is None else tensor for tensor in (y, weight, bias)]
    modulations = gate, scale, shift
    parts = [part for rows in modulations for part in parts_of(x if rows is None else rows)]
    strides = [stride for rows in modulations for stride in ((0, 0) if rows is None else row_strides(rows))]
    launch: Any = _layer_norm[(batch * seq,)]
    with launching_on(x.device):
        launch(
            x, *given, *parts, h, out, eps, seq, split_index or 0, *strides,
            RESIDUAL=y is not None, WEIGHT=weight is not None, BIAS=bias is not None, **kinds,
            DIM=dim, TILE=TILE,
            num_warps=TILE * x.element_size() // 512, enable_fp_fusion=False,
        )  # fmt: skip
    return h, out
