"""Norms in one pass: the arguments of kernels, and the requirement that a kernel is as accurate as stock."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from wan_patches.ops import fused_norm as op
from wan_patches.ops import modulation as exact
from wan_patches.ops import rope
from wan_patches.ops.modulation import SegmentedModulation
from wan_patches.patching.fidelity import Fidelity, gate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Norm(torch.nn.LayerNorm):
    """As diffusers' `FP32LayerNorm`."""

    def forward(self, x):
        parameters = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, *parameters, self.eps).to(x.dtype)


@pytest.fixture
def kernel(as_on_cuda, monkeypatch):
    """The way of GPUs on the CPU, with arithmetic in float64 in the kernels' place, and an error that can be set."""
    state = SimpleNamespace(calls=0, error=0.0)

    def normed(x, weight, bias, scale, shift, eps, split_index):
        state.calls += 1
        weight, bias = (None if p is None else p.double() for p in (weight, bias))
        value = F.layer_norm(x.double(), x.shape[-1:], weight, bias, eps)
        if scale is not None:
            rows = [
                r if split_index is None else SegmentedModulation(r, split_index, x.shape[1]).dense()
                for r in (scale, shift)
            ]
            value = value * (1 + rows[0].double()) + rows[1].double()
        return (value + state.error).to(x.dtype)

    def residual(x, y, by, weight, bias, scale, shift, eps, split_index):
        if by is None:
            h = x + y
        else:
            rows = by if split_index is None else SegmentedModulation(by, split_index, x.shape[1]).dense()
            h = (x.float() + y.float() * rows).to(x.dtype)
        return h, normed(h, weight, bias, scale, shift, eps, split_index)

    def rms_norm_rope(x, weight, eps, cos, sin, heads):
        state.calls += 1
        wide = x.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double() + state.error
        rotated = rope.apply_rotary_emb.reference(normed.unflatten(-1, (heads, -1)), cos.double(), sin.double())
        return rotated.to(x.dtype)

    stand_in = SimpleNamespace(
        layer_norm_modulate=normed, residual_layer_norm_modulate=residual, rms_norm_rope=rms_norm_rope, MAX_DIM=64
    )
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.close", stand_in)
    return state


def _inputs(dtype, kind, dim=48, affine=False):
    torch.manual_seed(0)
    norm = Norm(dim, eps=1e-6, elementwise_affine=affine).to(dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x, y = torch.randn(2, 2, 9, dim).to(dtype)
    tensors = torch.randn(3, 2, {"row": 1, "token": 9, "two rows": 2}[kind], dim)
    return (
        norm,
        x,
        y,
        [SegmentedModulation(tensor, 4, x.shape[1]) if kind == "two rows" else tensor for tensor in tensors],
    )


def _all(norm, x, y, modulations):
    by, scale, shift = modulations
    return (
        op.modulated_norm(x, norm, scale, shift),
        op.cast_norm(x, norm),
        *op.residual_norm(x, y, by, norm, None, None),
        *op.residual_norm(x, y, None, norm, scale, shift),
    )


def _stock(norm, x, y, modulations):
    by, scale, shift = modulations
    return (
        exact.modulated_norm.reference(x, norm, scale, shift),
        exact.cast_norm.reference(x, norm),
        *exact.residual_norm.reference(x, y, by, norm, None, None),
        *exact.residual_norm.reference(x, y, None, norm, scale, shift),
    )


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["row", "token", "two rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_kernels_get_the_right_arguments(dtype, kind, affine, kernel):
    inputs = _inputs(dtype, kind, affine=affine)
    stock = _stock(*inputs)
    for _ in range(2):  # at first sight, and after it
        for ours, expected in zip(_all(*inputs), stock, strict=True):
            assert ours.dtype == expected.dtype
            torch.testing.assert_close(ours, expected)
    assert kernel.calls == 8
    verdicts = gate.verdicts()
    assert len(verdicts) == 4
    assert all(verdict.exact and verdict.fidelity is Fidelity.CLOSE for verdict in verdicts)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_residual_sums_keep_their_bits(dtype, kernel):
    norm, x, y, (by, scale, shift) = _inputs(dtype, "row")
    for _ in range(2):
        assert torch.equal(op.residual_norm(x, y, by, norm, None, None)[0], exact.gated_residual.reference(x, y, by))
        assert torch.equal(op.residual_norm(x, y, None, norm, scale, shift)[0], x + y)


@torch.no_grad()
def test_less_accurate_kernel_is_not_used(kernel):
    inputs = _inputs(torch.bfloat16, "row")
    kernel.error = 0.02
    for _ in range(2):
        for ours, expected in zip(_all(*inputs), _stock(*inputs), strict=True):
            assert torch.equal(ours, expected)
    verdicts = [verdict for verdict in gate.verdicts() if verdict.form == "one kernel" and "one pass" in verdict.op]
    assert {verdict.reason for verdict in verdicts} == {"is less accurate than the stock formulation"}
    assert len(verdicts) == 4


@pytest.mark.parametrize("why", ["too wide", "weight dtype", "no kernel"])
@torch.no_grad()
def test_other_input_uses_the_exact_forms(why, kernel, monkeypatch):
    norm, *rest = _inputs(torch.bfloat16, "row", dim=80 if why == "too wide" else 48, affine=True)
    if why == "weight dtype":
        norm.double()
    elif why == "no kernel":
        monkeypatch.setattr(op.kernels, "is_usable", lambda device: False)
    for ours, expected in zip(_all(norm, *rest), _stock(norm, *rest), strict=True):
        assert torch.equal(ours, expected)
    assert kernel.calls == 0


@pytest.mark.parametrize("error", [0.0, 0.02])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_rms_norm_and_rotary_embedding(dtype, error, kernel):
    kernel.error = error
    torch.manual_seed(0)
    x, weight = torch.randn(2, 100, 3, 2, 24).to(dtype)[:, :, 1], torch.randn(48).to(dtype)
    cos, sin = torch.rand(2, 1, 100, 1, 12)

    def plain():
        normed = F.rms_norm(x.flatten(2), (48,), weight, 1e-6)
        return rope.apply_rotary_emb.reference(normed.unflatten(2, (2, 24)), cos, sin)

    loose = 1e-5 if dtype == torch.float32 else 0.03  # stock rounds the norm by itself
    tolerance = dict.fromkeys(("rtol", "atol"), 0 if error else loose)
    for _ in range(2):
        found = op.rms_norm_rope(x, weight, 1e-6, cos, sin)
        torch.testing.assert_close(found, plain(), **tolerance)
    assert kernel.calls == (1 if error else 2)
    verdict = next(verdict for verdict in gate.verdicts() if verdict.op.startswith("RMS norm and"))
    assert (verdict.exact, verdict.fidelity) == (not error, Fidelity.CLOSE)
