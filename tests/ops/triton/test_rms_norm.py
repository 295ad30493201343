"""RMS norm and rotary embedding in one pass, in ATen's order."""

from __future__ import annotations

import re

import pytest
import torch


def test_order_is_that_of_aten(interpret):
    interpret("rms_norm")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("heads", [40, 12, 24, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_kernel(compiled, dtype, heads, capability):
    """Fuses the sum of squares and nothing else; moves 16 bytes at a time; keeps all in registers."""
    from wan_patches.ops.triton import rms_norm

    channels = heads * 128
    x, weight = torch.randn(1, 3, 3 * channels).to(dtype).chunk(3, dim=-1)[0], torch.randn(channels).to(dtype)
    cos, sin = torch.randn(2, 1, 3, 1, 128)[..., 0::2]
    call = lambda: rms_norm.rms_norm_rope(x, weight, 1e-6, cos, sin, heads)  # noqa: E731
    built = compiled(rms_norm, "_rms_norm_rope", call, capability)
    text = built.asm["ptx"]
    assert text.count("fma.rn.f32") == text.count("fma.") == channels // 128 * (4 // dtype.itemsize)
    assert (text.count("div.rn.f32"), text.count("rsqrt.approx.ftz.f32")) == (1, 1)
    assert text.count("approx") == text.count("ftz") == 1
    assert text.count("ld.global.v4.b32") == 2 * channels // 512  # hidden states and weight
    assert text.count("ld.global") <= 2 * channels // 512 + 4  # tables
    assert text.count("st.global.v4.b32") == text.count("st.global") == channels // 512
    assert not re.search(r"\b(?:LDL|STL)\b", built.asm["sass"])
