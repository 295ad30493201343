"""The kernel of the rotary embedding per channel."""

from __future__ import annotations

import pytest
import torch


def test_kernel_is_bit_identical_to_stock(interpret):
    interpret("rope_per_channel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("halves", [False, True])
def test_compiled_kernel_rounds_as_stock(ptx, dtype, halves):
    from wan_patches.ops.triton import rope_per_channel

    x, tables = torch.randn(1, 3, 24, 128).to(dtype), torch.randn(4, 1, 3, 1, 64)
    text = ptx(rope_per_channel, "_kernel", lambda: rope_per_channel.rotate(x, tuple(tables), halves))
    assert "fma." not in text
    assert "ftz" not in text
    if halves or dtype != torch.float32:  # a thread has both values of a pair, and their table
        assert "st.shared" not in text
    assert "st.global.v4.b32" in text or (halves and "st.global.v2.b32" in text)
    assert "st.global.b" not in text  # no single values
