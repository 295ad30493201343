"""CLOSE kernels: their error against fp64, compared with that of stock's operations on the same input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wan_patches.ops import rope
from wan_patches.ops.triton.close import layer_norm_modulate, residual_layer_norm_modulate, rms_norm_rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [1536, 3072, 5120]  # 1.3B, 5B, 14B
SEEDS = range(4)
# tokens: the error of fp32 is mostly that of each token's mean and variance, of which few say little
SEQ = {torch.float32: 40, torch.bfloat16: 8, torch.float16: 8}
EPS = 1e-6


def modulated(h, weight, bias, scale, shift):
    """In the dtype of `h`: fp32 is stock, fp64 the reference."""
    weight, bias = (None if given is None else given.to(h.dtype) for given in (weight, bias))
    normed = F.layer_norm(h, h.shape[-1:], weight, bias, EPS)
    return normed if scale is None else normed * (1 + scale.to(h.dtype)) + shift.to(h.dtype)


def rotated(x, weight, cos, sin, heads):
    normed = F.rms_norm(x, x.shape[-1:], weight, EPS).unflatten(-1, (heads, -1))
    return rope.apply_rotary_emb.reference(normed, cos, sin)


def mean_error(found, exact):
    return (found.double() - exact).abs().mean().item()


def drawn(seq, dim, dtype, seed):
    """Hidden states with the outliers and the offset that those of real models have."""
    torch.manual_seed(seed)
    x = torch.randn(1, seq, dim) * (1 + 20 * (torch.rand(dim) > 0.99)) + 0.3 * torch.randn(1, seq, 1)
    return x.to(dtype)


def no_worse(ours, stock):
    assert sum(stock) > 0
    assert sum(ours) <= 1.01 * sum(stock), sum(ours) / sum(stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("affine", "modulate"), [(False, True), (True, False), (True, True)])
def test_layer_norm_and_modulation(dim, dtype, affine, modulate):
    ours, stock = [], []
    for seed in SEEDS:
        x = drawn(SEQ[dtype], dim, dtype, seed)
        weight, bias = torch.randn(2, dim).to(dtype) if affine else (None, None)
        scale, shift = torch.randn(2, 1, 1, dim) * 0.5 if modulate else (None, None)
        exact = modulated(x.double(), weight, bias, scale, shift)
        found = layer_norm_modulate(x, weight, bias, scale, shift, EPS)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        ours.append(mean_error(found, exact))
        stock.append(mean_error(modulated(x.float(), weight, bias, scale, shift).to(dtype), exact))
    no_worse(ours, stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("gated", [False, True])
def test_residual_sum_is_exact_and_its_norm_close(dim, dtype, gated):
    ours, stock = [], []
    for seed in SEEDS:
        x, y = drawn(SEQ[dtype], dim, dtype, seed), drawn(SEQ[dtype], dim, dtype, seed + 100)
        gate, scale, shift = torch.randn(3, 1, 1, dim) * 0.5
        expected = (x.float() + y.float() * gate).to(dtype) if gated else x + y
        h, found = residual_layer_norm_modulate(x, y, gate if gated else None, None, None, scale, shift, EPS)
        assert h.dtype == dtype
        assert torch.equal(h, expected)
        exact = modulated(h.double(), None, None, scale, shift)
        ours.append(mean_error(found, exact))
        stock.append(mean_error(modulated(h.float(), None, None, scale, shift).to(dtype), exact))
    no_worse(ours, stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm_and_rotary_embedding(dim, dtype):
    ours, stock, heads = [], [], dim // 128
    for seed in SEEDS:
        fused = drawn(SEQ[dtype], 3 * dim, dtype, seed)  # the projections are of a fused one
        x = fused.chunk(3, dim=-1)[1]
        weight = (1 + 0.3 * torch.randn(dim)).to(dtype)
        angles = torch.rand(1, SEQ[dtype], 1, 64) * 100
        cos, sin = angles.cos().repeat_interleave(2, -1)[..., 0::2], angles.sin().repeat_interleave(2, -1)[..., 1::2]
        exact = rotated(x.double(), weight.double(), cos.double(), sin.double(), heads)
        found = rms_norm_rope(x, weight, EPS, cos, sin, heads)
        assert (found.dtype, found.shape) == (dtype, (1, SEQ[dtype], heads, 128))
        assert found.is_contiguous()
        ours.append(mean_error(found, exact))
        stock.append(mean_error(rotated(x, weight, cos, sin, heads), exact))
    no_worse(ours, stock)


@pytest.mark.parametrize("given", ["weight", "bias", "both"])
def test_weight_and_bias_are_optional(given):
    x, weight, bias = torch.randn(1, 3, 24), torch.randn(24), torch.randn(24)
    affine = (weight if given != "bias" else None, bias if given != "weight" else None)
    found = layer_norm_modulate(x, *affine, None, None, EPS)
    torch.testing.assert_close(found, modulated(x, *affine, None, None))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["one", "each", "two", "two at the start", "two of a sample"])
@pytest.mark.parametrize("dim", [8, 100])
def test_rows_and_strides(dim, kind, batch):
    seq = 7
    rows = {"one": 1, "each": seq}.get(kind, 2)
    split_index = None if rows != 2 else 0 if "start" in kind else 3
    gate, scale, shift = (torch.randn(batch if "sample" in kind else 1, rows, 6, dim)[:, :, i] for i in range(3))

    def dense(given):
        return (
            given
            if rows != 2
            else torch.cat(
                (given[:, :1].expand(-1, split_index, -1), given[:, 1:].expand(-1, seq - split_index, -1)), 1
            )
        )

    wide = torch.randn(2, batch, seq, 3 * dim)
    x, y = wide[0, :, :, dim : 2 * dim], wide[1, :, :, :dim]
    expected = x + y * dense(gate)
    h, normed = residual_layer_norm_modulate(x, y, gate, None, None, scale, shift, EPS, split_index)
    assert torch.equal(h, expected)
    torch.testing.assert_close(normed, modulated(h, None, None, dense(scale), dense(shift)))
    torch.testing.assert_close(layer_norm_modulate(h, None, None, scale, shift, EPS, split_index), normed)


@pytest.mark.parametrize(("heads", "dim"), [(3, 6), (5, 44), (1, 2), (2, 96)])
def test_rotation_of_any_number_of_heads(heads, dim):
    for batch in (1, 2):
        x, weight = torch.randn(2, 5, heads * dim), torch.randn(heads * dim)
        cos, sin = torch.randn(2, batch, 5, 1, dim // 2)
        found = rms_norm_rope(x, weight, EPS, cos, sin, heads)
        torch.testing.assert_close(found, rotated(x, weight, cos, sin, heads))


def test_norms_keep_accuracy_far_from_zero():
    """The variance is that of centred values: a large mean does not drown it."""
    x = torch.randn(1, 4, 1536) + 4096
    exact = modulated(x.double(), None, None, None, None)
    found = layer_norm_modulate(x, None, None, None, None, EPS)
    assert mean_error(found, exact) <= 1.01 * mean_error(modulated(x, None, None, None, None), exact)


def test_too_many_channels_raise():
    with pytest.raises(ValueError, match="8194 channels, at most 8192"):
        layer_norm_modulate(torch.randn(1, 1, 8194), None, None, None, None, EPS)
    with pytest.raises(ValueError, match="8194 channels, at most 8192"):
        rms_norm_rope(torch.randn(1, 1, 8194), torch.randn(8194), EPS, *torch.randn(2, 1, 1, 1, 4097), 1)


def test_error_of_a_worse_kernel_is_detected():
    """The bound above is one that rounding once too often breaks."""
    x = drawn(5, 1536, torch.bfloat16, 0)
    scale, shift = torch.randn(2, 1, 1, 1536) * 0.5
    exact = modulated(x.double(), None, None, scale, shift)
    once = modulated(x.float(), None, None, scale, shift).bfloat16()
    twice = (modulated(x.float(), None, None, None, None).bfloat16() * (1 + scale) + shift).bfloat16()
    with pytest.raises(AssertionError):
        no_worse([mean_error(twice, exact)], [mean_error(once, exact)])
