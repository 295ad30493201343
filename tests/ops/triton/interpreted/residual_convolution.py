"""Bias and residual in Triton's interpreter, which truncates where it stores bf16: not tried here."""

from __future__ import annotations

import pytest
import torch

from wan_patches.ops.triton.residual_convolution import add_bias_and_residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 19, 23), (1, 6, 1, 3, 5), (1, 2, 2, 32, 64)])
def test_bits_are_those_of_two_additions(shape, dtype):
    torch.manual_seed(0)
    y, shortcut, bias = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    y[0, 0, 0, 0] = torch.inf
    y[0, 0, 0, 1] = -bias[0]
    expected = (y + bias.view(-1, 1, 1, 1)) + shortcut
    before = shortcut.clone()
    add_bias_and_residual(y, bias, shortcut)
    assert torch.equal(y, expected)
    assert torch.equal(shortcut, before)
