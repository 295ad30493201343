"""The kernel of the rotary embedding."""

from __future__ import annotations

import pytest
import torch


def test_kernel_is_bit_identical_to_stock(interpret):
    interpret("rope")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["query", "both", "fused"])
def test_compiled_kernel_rounds_as_stock_and_moves_sixteen_bytes(ptx, dtype, layout):
    from wan_patches.ops.triton import rope

    query, key, _ = torch.randn(1, 3, 3 * 40 * 128).to(dtype).unflatten(2, (120, 128)).chunk(3, dim=2)
    if layout != "fused":
        query, key = query.contiguous(), key.contiguous() if layout == "both" else None
    cos, sin = torch.randn(2, 1, 3, 1, 128)[..., 0::2]
    text = ptx(rope, "_kernel", lambda: rope.rotate(query, key, cos, sin))
    assert "fma." not in text
    assert "ftz" not in text
    assert "st.shared" not in text  # a thread has both values of a pair
    tiles = 5 * (1 if key is None else 2) * (2 if dtype == torch.float32 else 1)
    assert text.count("ld.global.v4.b32") == text.count("st.global.v4.b32") == tiles
    assert text.count("st.global") == tiles
    assert text.count("ld.global") - tiles <= 8  # the tables, once
