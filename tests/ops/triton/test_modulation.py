"""The kernels of modulation, gated residual, and sum with cast."""

from __future__ import annotations

import pytest
import torch

HALVES = [torch.bfloat16, torch.float16]


def test_kernels_are_bit_identical_to_the_operations_of_stock(interpret):
    interpret("modulation")


def check(text, dtype, loads, stores):
    assert "fma." not in text  # product and sum are rounded each
    assert "ftz" not in text
    rounded = "bf16" if dtype == torch.bfloat16 else "f16"
    assert f"cvt.rn.{rounded}" in text or f"add.rn.{rounded}" in text  # as precise: a sum of halves needs no fp32
    assert text.count("ld.global.v4.b32") == text.count("ld.global") == loads
    assert text.count("st.global.v4.b32") == text.count("st.global") == stores


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "read"), [(1, 1), (2, 2), (9, 4)])
def test_compiled_kernels_round_as_stock_and_read_rows_once(ptx, rows, read, dtype):
    """Of four tokens, one row for all is read once, two are read once each, and each token's own is."""
    from wan_patches.ops.triton import modulation

    split_index = 4 if rows == 2 else None
    normed, x = torch.randn(2, 9, 5120), torch.randn(2, 9, 5120).to(dtype)
    scale, shift = torch.randn(2, rows, 6, 5120)[:, :, :2].unbind(2)
    text = ptx(modulation, "_modulate", lambda: modulation.modulate(normed, scale, shift, dtype, split_index))
    check(text, dtype, loads=2 * (4 + 2 * read), stores=4)
    assert "st.shared" not in text
    text = ptx(modulation, "_gated_residual", lambda: modulation.gated_residual(x, x, scale, split_index))
    check(text, dtype, loads=4 + 4 + 2 * read, stores=4)
    assert "st.shared" not in text


@pytest.mark.parametrize("dtype", HALVES)
def test_sum_with_cast_moves_sixteen_bytes(ptx, dtype):
    from wan_patches.ops.triton import modulation

    x = torch.randn(1, 16, 5120).to(dtype)
    check(ptx(modulation, "_add_and_cast", lambda: modulation.add_and_cast(x, x)), dtype, loads=2, stores=3)


def test_rows_that_are_sums_are_read_in_their_dtypes(ptx):
    from wan_patches.ops.triton import modulation

    x, table, temb = torch.randn(1, 9, 3072).bfloat16(), torch.randn(1, 1, 3072), torch.randn(1, 9, 6, 3072).bfloat16()
    gate = table, temb[:, :, 2]
    text = ptx(modulation, "_gated_residual", lambda: modulation.gated_residual(x, x, gate))
    check(text, torch.bfloat16, loads=4 + 4 + 4 + 2, stores=4)
