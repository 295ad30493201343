"""Bias and lengths after a convolution, in one pass and in ATen's order."""

from __future__ import annotations

import re

import pytest
import torch


def test_order_is_that_of_aten(interpret):
    interpret("normed_convolution")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_kernel_fuses_squares_only(dtype, capability, compiled):
    """Moves 16 bytes at a time, and keeps all in registers."""
    from wan_patches.ops.triton import normed_convolution as module

    y, bias = torch.empty(1, 96, 4, 32, 48, dtype=dtype), torch.empty(96, dtype=dtype)
    call = lambda: module.add_bias_and_measure(y, bias, torch.float32)  # noqa: E731
    built = compiled(module, "_add", call, capability)
    text = built.asm["ptx"]
    squares = re.findall(r"fma\.rn\.f32(?:x2)?\s+%\w+, (%\w+), (%\w+),", text)
    assert squares
    assert all(first == second for first, second in squares)
    assert "mul.f32" not in text
    assert "mul.rn.f32" not in text
    assert "sqrt.rn.f32" in text
    assert "approx" not in text
    assert text.count("ld.global.v4") >= 4
    assert text.count("st.global.v4") >= 4
    assert not re.search(r"\b(?:LDL|STL)\b", built.asm["sass"])
