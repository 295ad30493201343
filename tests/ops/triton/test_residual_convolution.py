"""Bias and residual after a convolution, in one pass."""

from __future__ import annotations

import re

import pytest
import torch


def test_bits_are_those_of_two_additions(interpret):
    interpret("residual_convolution")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_kernel_moves_sixteen_bytes(dtype, capability, compiled):
    from wan_patches.ops.triton import residual_convolution as module

    y, bias = torch.empty(1, 96, 4, 32, 48, dtype=dtype), torch.empty(96, dtype=dtype)
    call = lambda: module.add_bias_and_residual(y, bias, torch.empty_like(y))  # noqa: E731
    built = compiled(module, "_add", call, capability)
    text = built.asm["ptx"]
    pieces = 8 * dtype.itemsize // 16
    assert text.count("ld.global.v4") == 2 * pieces
    assert text.count("st.global.v4") == text.count("st.global") == pieces
    assert not re.search(r"\b(?:LDL|STL)\b", built.asm["sass"])
