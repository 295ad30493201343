"""Layer norm in one pass against ATen's order on CUDA, and the operations of torch that stock runs around it."""

from __future__ import annotations

from fractions import Fraction

import aten
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import same

from wan_patches.ops import modulation as ops
from wan_patches.ops.modulation import RowPerToken, SegmentedModulation
from wan_patches.ops.triton.layer_norm import layer_norm_modulate, residual_layer_norm_modulate
from wan_patches.patching import tally
from wan_patches.patching.fidelity import gate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [5120, 1536, 3072, 512]  # 14B and Helios, 1.3B, 5B; the least
KINDS = ["one", "one for a sample", "each", "sum", "two", "two of a sample", "two at the start"]
EPS = 1e-6


class Norm(torch.nn.LayerNorm):
    """As diffusers' `FP32LayerNorm`, in ATen's order on CUDA."""

    def forward(self, x):
        parameters = (None if p is None else p.detach().float().numpy() for p in (self.weight, self.bias))
        rows = x.float().reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(aten.layer_norm(rows, *parameters, self.eps)).reshape(x.shape).to(x.dtype)


def a_norm(dim, affine=False, dtype=torch.float32):
    norm = Norm(dim, eps=EPS, elementwise_affine=affine)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm.to(dtype)


def drawn(*shape, dtype=torch.float32):
    """Hidden states with the outliers and the offsets that those of real models have, at any scale."""
    scale, offset = 10 ** torch.empty(2, *shape[:-1], 1).uniform_(-4, 3)
    outliers = 1 + 20 * (torch.rand(shape[-1]) > 0.99)
    return (torch.randn(shape) * outliers * scale + torch.randn(*shape[:-1], 1) * offset).to(dtype)


def rows(kind, shape, dtype=torch.float32):
    """A modulation of one kind: a view of all six of a block, as in stock."""
    batch, seq, dim = shape
    if kind == "sum":
        return RowPerToken(torch.randn(1, 6, dim)[:, 3:4].to(dtype), torch.randn(batch, seq, 6, dim).to(dtype)[:, :, 3])
    count = {"one": 1, "eac": seq, "two": 2}[kind[:3]]
    of_all = torch.randn(batch if "sample" in kind else 1, count, 6, dim)[:, :, 3]
    return SegmentedModulation(of_all, 0 if "start" in kind else seq // 2, seq) if count == 2 else of_all


def affine(norm):
    return (None if p is None else p.detach() for p in (norm.weight, norm.bias))


def of_kernel(x, norm, scale=None, shift=None):
    given = (None if modulation is None else ops.of_kernel(modulation) for modulation in (scale, shift))
    return layer_norm_modulate(x, *affine(norm), *given, norm.eps, None if scale is None else ops.border_of(scale))


def test_fused_multiply_add_of_the_emulation_rounds_once():
    """Against rational numbers; many of these sums are close to the middle between two numbers of fp32."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 3000)).astype(np.float32)
    c = (-a * b * generator.choice([1, 1 + 2**-20, 2**-24, 2**24, 0], 3000)).astype(np.float32)
    a[:1000], b[:1000] = 1 + 2.0**-12, 1 + 2.0**-12
    c[:1000] = generator.integers(-(2**24), 2**24, 1000) * 2.0**-23
    found = aten.fma(a, b, c)
    for x, y, z, ours in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = (np.nextafter(ours, np.float32(side)) for side in (-np.inf, np.inf))
        distance = abs(Fraction(float(ours)) - exact)
        assert all(distance <= abs(Fraction(float(other)) - exact) for other in (below, above))
    assert (found != a * b + c).any()


@pytest.mark.parametrize("dim", [4, 508, 516, 1536, 1540, 5120])
def test_emulation_computes_the_norm(dim):
    x, (weight, bias) = torch.randn(8, dim) * 3 + 1, torch.randn(2, dim)
    found = torch.from_numpy(aten.layer_norm(x.numpy(), weight.numpy(), bias.numpy(), EPS)).double()
    exact = F.layer_norm(x.double(), (dim,), weight.double(), bias.double(), EPS)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
@torch.no_grad()
def test_norm_and_modulation(dim, kind, dtype):
    shape = (2, 4, dim)
    x, norm, scale, shift = drawn(*shape, dtype=dtype), a_norm(dim), rows(kind, shape, dtype), rows(kind, shape)
    same(of_kernel(x, norm, scale, shift), ops.modulated_norm.reference(x, norm, scale, shift))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_weights", DTYPES)
@pytest.mark.parametrize("given", ["both", "weight", "bias"])
@torch.no_grad()
def test_weight_and_bias(given, of_weights, dtype):
    x, norm = drawn(2, 3, 1536, dtype=dtype), a_norm(1536, affine=True, dtype=of_weights)
    if given != "both":
        setattr(norm, "bias" if given == "weight" else "weight", None)
    scale, shift = torch.randn(2, 1, 1, 1536)
    same(of_kernel(x, norm), ops.cast_norm.reference(x, norm))
    same(of_kernel(x, norm, scale, shift), ops.modulated_norm.reference(x, norm, scale, shift))


@pytest.mark.parametrize(("dtype", "of_y"), [*zip(DTYPES, DTYPES), (DTYPES[1], DTYPES[0]), (DTYPES[0], DTYPES[1])])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("modulated", [True, False])
@torch.no_grad()
def test_residual_sum_and_norm(modulated, kind, dtype, of_y):
    shape = (2, 4, 1536)
    if kind is None:
        of_y = dtype
    x, y, norm = drawn(*shape, dtype=dtype), drawn(*shape, dtype=of_y), a_norm(1536, affine=not modulated)
    by = None if kind is None else rows(kind, shape, dtype)
    scale, shift = (rows(kind or "one", shape) for _ in range(2)) if modulated else (None, None)
    given = (None if modulation is None else ops.of_kernel(modulation) for modulation in (by, scale, shift))
    gate_rows, factor, term = given
    border = next((ops.border_of(modulation) for modulation in (by, scale) if modulation is not None), None)
    found = residual_layer_norm_modulate(x, y, gate_rows, *affine(norm), factor, term, EPS, border)
    for ours, theirs in zip(found, ops.residual_norm.reference(x, y, by, norm, scale, shift), strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_unusual_values(dtype):
    x = drawn(1, 12, 1536, dtype=dtype)
    x[0, 0], x[0, 1], x[0, 2] = 0, -0.0, 7
    x[0, 3, 700], x[0, 4, 3], x[0, 5, -1] = float("inf"), -float("inf"), float("nan")
    x[0, 6], x[0, 7] = torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max
    x[0, 8] = torch.arange(1536)
    x[0, 9, 1:] = 0
    x[0, 10] = 1000 + torch.randn(1536) / 1000
    with np.errstate(all="ignore"):
        same(of_kernel(x, a_norm(1536)), ops.cast_norm.reference(x, a_norm(1536)))


@pytest.mark.parametrize("dim", DIMS)
@torch.no_grad()
def test_many_rows(dim):
    _compare_rows(dim, 40)


@pytest.mark.slow
@pytest.mark.parametrize("dim", DIMS)
@torch.no_grad()
def test_thousands_of_rows(dim):
    _compare_rows(dim, 3000)


def _compare_rows(dim, count):
    x = drawn(1, count, dim)
    same(of_kernel(x, a_norm(dim)), a_norm(dim)(x))


@pytest.mark.parametrize("dim", range(512, 8193, 512))
@torch.no_grad()
def test_every_width(dim):
    _compare_rows(dim, 4)


@torch.no_grad()
def test_another_order_is_noticed():
    x, norm = drawn(1, 20, 5120), a_norm(5120)
    moved = x.reshape(1, 20, 10, 128, 4).roll(1, 3).reshape_as(x)  # to the next thread
    found = of_kernel(moved, norm).reshape(1, 20, 10, 128, 4).roll(-1, 3).reshape_as(x)
    assert not torch.equal(found, norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one", "two", "sum"])
@torch.no_grad()
def test_dispatch_and_gate(kind, dtype, as_on_cuda):
    shape = (2, 4, 512)
    x, y, norm = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype), a_norm(512, affine=True, dtype=dtype)
    by, scale, shift = (rows(kind, shape, dtype) for _ in range(3))
    for _ in range(2):  # at first sight, and after it
        same(ops.modulated_norm(x, norm, scale, shift), ops.modulated_norm.reference(x, norm, scale, shift))
        same(ops.cast_norm(x, norm), ops.cast_norm.reference(x, norm))
        for args in ((by, norm, scale, shift), (None, norm, scale, shift), (by, norm, None, None)):
            found, expected = ops.residual_norm(x, y, *args), ops.residual_norm.reference(x, y, *args)
            for ours, theirs in zip(found, expected, strict=True):
                same(ours, theirs)
    took = {(way.op, way.form) for way in tally.counted() if way.is_fast}
    names = {"modulated norm", "residual norm"} | ({"cast norm"} if dtype != torch.float32 else set())
    assert took == {(name, "one kernel, in the order of ATen's norm") for name in names}
    assert all(verdict.exact for verdict in gate.verdicts()), gate.verdicts()


@pytest.mark.parametrize(("dtype", "seq", "dim"), [(torch.float32, 16, 5120), (torch.bfloat16, 1, 512)])
@torch.no_grad()
def test_norm_of_another_order_takes_the_next_form(dtype, seq, dim, as_on_cuda):
    """As on a GPU whose torch has changed; here the other order is that of CPUs.

    Of few values in bf16 all have the same bits.
    """

    class OnCpu(torch.nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x.float(), self.normalized_shape, None, None, self.eps).to(x.dtype)

    x, norm, (scale, shift) = torch.randn(1, seq, dim).to(dtype), OnCpu(dim, EPS, False), torch.randn(2, 1, 1, dim)
    expected = ops.modulated_norm.reference(x, norm, scale, shift)
    assert torch.equal(ops.modulated_norm_in_one(x, norm, scale, shift), expected) == (dtype == torch.bfloat16)
    for _ in range(2):
        same(ops.modulated_norm(x, norm, scale, shift), ops.modulated_norm.reference(x, norm, scale, shift))
    first, second = gate.verdicts()
    assert (first.form, first.exact) == ("one kernel, in the order of ATen's norm", False)
    assert (second.form, second.exact) == ("one kernel after the norm", True)
    assert {way.form for way in tally.counted() if way.is_fast} == {second.form}


@torch.no_grad()
def test_other_norms_take_other_forms(as_on_cuda, monkeypatch):
    x, (scale, shift) = drawn(1, 4, 512), torch.randn(2, 1, 1, 512)
    norm = a_norm(512)

    def reason(x, norm=norm, scale=scale, shift=shift):
        return ops.modulated_norm_in_one.why_not(x, norm, scale, shift)

    assert reason(x) is None
    assert "width" in reason(drawn(1, 4, 516), a_norm(516), *torch.randn(2, 1, 1, 516))
    assert "width" in reason(drawn(1, 4, 8704), a_norm(8704), *torch.randn(2, 1, 1, 8704))
    assert "contiguous" in reason(drawn(1, 512, 4).transpose(1, 2))
    unaligned = torch.empty(4 * 512 + 1)[1:].view(1, 4, 512)
    assert "unaligned" in reason(unaligned)
    assert reason(torch.empty(4 * 512 + 1, dtype=torch.bfloat16)[1:].view(1, 4, 512)) is None  # cast to new memory
    weighted = a_norm(512, affine=True)
    weighted.weight = torch.nn.Parameter(torch.empty(513)[1:])
    assert "unaligned" in reason(x, weighted)
    assert "weights" in reason(x, a_norm(512, affine=True, dtype=torch.float64))
    norm.eps = 0.0
    assert "weights" in reason(x)
    norm.eps = EPS
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in reason(x)


def test_wrong_widths_raise():
    for dim in (516, 8704):
        with pytest.raises(ValueError, match=f"{dim} channels, not a multiple of 512 up to 8192"):
            layer_norm_modulate(torch.randn(1, 1, dim), None, None, None, None, EPS)
