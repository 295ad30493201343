"""The CLOSE kernels: norms in one pass."""

from __future__ import annotations

import pytest
import torch


def test_error_against_fp64_is_no_larger_than_that_of_stock(interpret):
    interpret("close")


@pytest.mark.slow
def test_error_over_a_denoising_loop_is_no_larger_than_that_of_stock(interpret):
    interpret("loop")


@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_reads_hidden_states_once(ptx, residual):
    from wan_patches.ops.triton import close

    x, (gate, scale, shift) = torch.randn(1, 3, 5120).bfloat16(), torch.randn(3, 1, 1, 5120)
    if residual:
        call = lambda: close.residual_layer_norm_modulate(x, x, gate, None, None, scale, shift, 1e-6)  # noqa: E731
    else:
        call = lambda: close.layer_norm_modulate(x, None, None, scale, shift, 1e-6)  # noqa: E731
    text = ptx(close, "_layer_norm_modulate", call)
    assert text.count("fma.rn.f32") == 16  # of scale and shift; the residual sum rounds as stock does
    assert "approx" not in text
    assert "div.full" not in text
    hidden = 2 if residual else 1
    assert text.count("ld.global.v4.b32") == text.count("ld.global") == 2 * hidden + 4 * (hidden + 1)
    assert text.count("st.global.v4.b32") == text.count("st.global") == 2 * hidden


@pytest.mark.parametrize("given", ["weight", "bias", "both", "neither"])
def test_weight_and_bias_are_read_if_given(ptx, given):
    from wan_patches.ops.triton import close

    x, affine = torch.randn(1, 3, 5120).bfloat16(), torch.randn(5120).bfloat16()
    weight, bias = (affine if given in (name, "both") else None for name in ("weight", "bias"))
    call = lambda: close.layer_norm_modulate(x, weight, bias, None, None, 1e-6)  # noqa: E731
    text = ptx(close, "_layer_norm_modulate", call)
    loads = 2 * (1 + sum(part is not None for part in (weight, bias)))
    assert text.count("ld.global.v4.b32") == text.count("ld.global") == loads


def test_rms_norm_and_rotary_embedding_read_once(ptx):
    from wan_patches.ops.triton import close

    x, weight = torch.randn(1, 3, 3 * 5120).bfloat16().chunk(3, dim=-1)[0], torch.randn(5120).bfloat16()
    cos, sin = torch.randn(2, 1, 3, 1, 128)[..., 0::2]
    text = ptx(close, "_rms_norm_rope", lambda: close.rms_norm_rope(x, weight, 1e-6, cos, sin, 40))
    assert text.count("fma.rn.f32") == 16
    assert "approx" not in text
    assert text.count("ld.global.v4.b32") == 2 + 2
    assert text.count("st.global.v4.b32") == text.count("st.global") == 2
