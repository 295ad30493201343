"""Modulation, gated residual and sum with cast against the operations of torch that stock runs."""

from __future__ import annotations

import pytest
import torch
from comparing import same

from wan_patches.ops.triton.modulation import add_and_cast, gated_residual, modulate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 6, 1100), (1, 9, 64), (1, 1, 8), (2, 2, 24)]  # more than a block; more tokens than one; the least
KINDS = ["one", "one for a sample", "each", "each for a sample", "sum", "two", "two for a sample", "two at the start"]


def rows(kind, shape, strided=True):
    """Rows of one kind (a view of all six of a block, as in stock), the split_index, and the same for every token."""
    batch, seq, dim = shape
    if kind == "sum":  # what is added to each token's row is fp32 or not, and so is that
        table, temb = torch.randn(1, 1, dim), torch.randn(batch, seq, 6, dim).bfloat16()[:, :, 3]
        table = table if strided else table.bfloat16()
        return (table, temb), None, table + temb.float()
    of_batch = batch if "sample" in kind else 1
    count = {"one": 1, "eac": seq, "two": 2}[kind[:3]]
    all_rows = torch.randn(of_batch, count, 6, dim)[:, :, 3] if strided else torch.randn(of_batch, count, dim)
    if count != 2 or kind.startswith("each"):
        return all_rows, None, all_rows
    split_index = 0 if "start" in kind else seq // 2
    dense = torch.cat(
        (all_rows[:, :1].expand(-1, split_index, -1), all_rows[:, 1:].expand(-1, seq - split_index, -1)), dim=1
    )
    return all_rows, split_index, dense


def special(x):
    flat = x.view(-1)
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, 3e38])[: flat.numel()]
    flat[: values.numel()] = values
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_modulate(shape, kind, dtype):
    normed = special(torch.randn(shape))
    scale, split_index, dense_scale = rows(kind, shape)
    shift, _, dense_shift = rows(kind, shape, strided=False)
    stock = (normed * (1 + dense_scale) + dense_shift).to(dtype)
    same(modulate(normed, scale, shift, dtype, split_index), stock)


def test_scale_and_shift_of_different_kinds():
    normed = torch.randn(2, 7, 40)
    scale, shift = torch.randn(1, 1, 40), torch.randn(2, 7, 40)
    same(modulate(normed, scale, shift, torch.bfloat16), (normed * (1 + scale) + shift).bfloat16())


@pytest.mark.parametrize(("dtype", "of_y"), [*zip(DTYPES, DTYPES), (DTYPES[1], DTYPES[0]), (DTYPES[0], DTYPES[1])])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(shape, kind, of_y, dtype):
    x, y = special(torch.randn(shape)).to(dtype), torch.randn(shape).to(of_y)
    gate, split_index, dense = rows(kind, shape)
    stock = (x.float() + y.float() * dense).to(dtype)
    wide = torch.randn(shape[0], shape[1], 2 * shape[2]).to(of_y)
    same(gated_residual(x, wide.chunk(2, dim=-1)[1].copy_(y), gate, split_index), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_and_cast(shape, dtype):
    x, y = special(torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    total, wide = add_and_cast(x, y)
    same(total, x + y)
    same(wide, (x + y).float())


def test_rows_that_do_not_fit_raise():
    normed, row = torch.randn(1, 5, 8), torch.randn(1, 1, 8)
    for wrong, split_index in ((2, None), (4, None), (5, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"{wrong} rows for 5 tokens"):
            modulate(normed, torch.randn(1, wrong, 8), row, torch.bfloat16, split_index)
        with pytest.raises(ValueError, match=f"{wrong} rows for 5 tokens"):
            gated_residual(normed, normed, torch.randn(1, wrong, 8), split_index)
