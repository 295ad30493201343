"""Every form of adaLN modulation and of gated residuals against stock's operations, on drawn inputs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_patches.fidelity import gate
from wan_patches.ops import modulation as ops
from wan_patches.ops.modulation import RowPerToken, TwoRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = 40  # a chunk, in elements


def _norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@st.composite
def cases(draw):
    """Hidden states, what a layer made of them, and two modulations of one kind."""
    torch.manual_seed(draw(st.integers(0, 99)))
    batch, seq, dim = draw(st.integers(1, 3)), draw(st.integers(1, 23)), draw(st.sampled_from((1, 8, 24, 96)))
    dtype, other = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(("row", "token", "two rows", "made when used")))
    rows = {"row": 1, "token": seq, "two rows": 2, "made when used": seq}[kind]
    border = draw(st.integers(0, seq))

    def modulation():
        if kind == "made when used":
            return RowPerToken(torch.randn(1, 3, dim)[:, 1:2], torch.randn(batch, seq, 3, dim).to(other)[:, :, 2])
        tensor = torch.randn(draw(st.sampled_from((1, batch))), 3 * rows, dim)[:, 1::3]  # as `chunk` leaves it
        return TwoRows(tensor, border, seq) if kind == "two rows" else tensor

    x = torch.randn(batch, seq, dim).to(dtype)
    if draw(st.booleans()):
        x[0, 0, 0] = draw(st.sampled_from((float("inf"), float("nan"), -0.0, 6e4)))
    return x, torch.randn(batch, seq, dim).to(other), modulation(), modulation()


def _dense(modulation, x):
    """Row by row, unlike the code under test."""
    if isinstance(modulation, RowPerToken):
        return modulation.table + modulation.temb.float()
    if not isinstance(modulation, TwoRows):
        return modulation
    rows = [modulation.rows[:, 0 if token < modulation.border else 1] for token in range(x.shape[1])]
    return torch.stack(rows, dim=1)


def _stock_norm(x, scale, shift):
    return (_norm(x.float()) * (1 + _dense(scale, x)) + _dense(shift, x)).type_as(x)


def _stock_residual(x, y, by):
    return (x.float() + y * _dense(by, x)).type_as(x)


def _assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def large(monkeypatch):
    """Small inputs count as large, and fill several chunks."""
    monkeypatch.setattr(ops, "_SMALL", 1)
    monkeypatch.setattr(ops, "_CHUNK", LARGE)


NORMS = [ops.modulated_norm, ops.plain_modulated_norm, ops._modulated_norm_in_chunks, ops._modulated_norm_in_place]
RESIDUALS = [ops.gated_residual, ops.plain_gated_residual, ops._gated_residual_in_chunks, ops._gated_residual_in_place]


@pytest.mark.parametrize("form", NORMS)
def test_modulated_norms_have_the_bits_of_stock(form, large):
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        x, _, scale, shift = case
        before = x.clone()
        _assert_same(form(x, _norm, scale, shift), _stock_norm(x, scale, shift))
        _assert_same(x, before)

    with torch.no_grad():
        check()


@pytest.mark.parametrize("form", RESIDUALS)
def test_gated_residuals_have_the_bits_of_stock(form, large):
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        x, y, by, _ = case
        before = x.clone(), y.clone()
        _assert_same(form(x, y, by), _stock_residual(x, y, by))
        _assert_same(x, before[0])
        _assert_same(y, before[1])

    with torch.no_grad():
        check()


@pytest.mark.parametrize("form", [ops.residual_norm, ops.plain_residual_norm, ops._residual_norm_in_chunks])
def test_residual_norms_have_the_bits_of_stock(form, large):
    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(cases(), st.booleans(), st.booleans())
    def check(case, gated, modulated):
        x, y, by, scale = case
        y = y if gated else y.to(x.dtype)
        before = x.clone(), y.clone()
        h, normed = form(x, y, by if gated else None, _norm, *((scale, by) if modulated else (None, None)))
        stock = _stock_residual(x, y, by) if gated else x + y
        _assert_same(h, stock)
        _assert_same(normed, _stock_norm(stock, scale, by) if modulated else _norm(stock.float()).type_as(stock))
        _assert_same(x, before[0])
        _assert_same(y, before[1])

    with torch.no_grad():
        check()


@torch.no_grad()
def test_sums_of_two_dtypes_have_the_one_that_stock_gives_them(large):
    x, y = torch.randn(1, 9, 8).bfloat16(), torch.randn(1, 9, 8)
    h, normed = ops.residual_norm(x, y, None, _norm, None, None)
    assert (h.dtype, normed.dtype) == (torch.float32, torch.float32)
    assert torch.equal(h, x + y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_real_chunks_and_threads(dtype, threads):
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 777, 1536).to(dtype)
    scale, shift = torch.randn(2, 1, 1, 1536)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert x.numel() > 2 * ops._CHUNK
        _assert_same(ops.modulated_norm(x, _norm, scale, shift), _stock_norm(x, scale, shift))
        _assert_same(ops.gated_residual(x, y, shift), _stock_residual(x, y, shift))
        _assert_same(ops.cast_norm(x, _norm), _norm(x.float()).type_as(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("change", ["strides", "dimensions", "fp64", "modulation dtype", "other border", "shape of y"])
@torch.no_grad()
def test_other_inputs_take_the_operations_of_stock(change, large, monkeypatch):
    for name in ("_modulated_norm_in_chunks", "_gated_residual_in_chunks"):
        monkeypatch.setattr(ops, name, lambda *args: pytest.fail("not for such input"))
    x, y = torch.randn(2, 2, 12, 8)
    scale, shift = torch.randn(2, 2, 1, 8)
    if change == "strides":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
    elif change == "dimensions":
        x, y = x[0], y[0]
        scale, shift = scale[0], shift[0]
    elif change == "fp64":
        x = x.double()
    elif change == "modulation dtype":
        scale, shift = scale.half(), shift.half()
    elif change == "other border":
        scale, shift = (TwoRows(torch.randn(2, 2, 8), border, x.shape[1]) for border in (3, 4))
    if change == "shape of y":
        y = y[:1]
    else:
        _assert_same(ops.modulated_norm(x, _norm, scale, shift), _stock_norm(x, scale, shift))
    if change != "other border":
        _assert_same(ops.gated_residual(x, y, shift), _stock_residual(x, y, shift))


def test_gradients_flow_as_in_stock(large):
    def grads(function):
        torch.manual_seed(0)
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 9, 8), (2, 9, 8), (2, 1, 8), (2, 1, 8))]
        function(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = grads(lambda x, y, a, b: ops.gated_residual(ops.modulated_norm(x, _norm, a, b), y, a))
    stock = grads(lambda x, y, a, b: _stock_residual(_stock_norm(x, a, b), y, a))
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


@torch.no_grad()
def test_rows_of_two_kinds_become_the_modulations_of_a_block():
    table, rows = torch.randn(1, 6, 8), torch.randn(3, 2, 6, 8).bfloat16()
    temb = torch.cat((rows[:, :1].expand(-1, 4, -1, -1), rows[:, 1:].expand(-1, 5, -1, -1)), dim=1)
    expected = (table.unsqueeze(0) + temb.float()).chunk(6, dim=2)
    two = TwoRows(rows, 4, 9)
    assert torch.equal(two.float(), temb.float())
    assert two.ndim == temb.ndim
    for ours, stock in zip(two.added_to(table), expected, strict=True):
        assert torch.equal(ours.dense(), stock.squeeze(2))


@pytest.fixture
def kernels(monkeypatch):
    """The way of GPUs on the CPU, with torch's arithmetic in the kernels' place; what they were given."""
    given = []

    def rows(tensor, x, border):
        return tensor if border is None else _dense(TwoRows(tensor, border, x.shape[1]), x)

    def modulate(normed, scale, shift, dtype, border=None):
        given.append(("modulate", scale.shape, border))
        return (normed * (1 + rows(scale, normed, border)) + rows(shift, normed, border)).to(dtype)

    def gated_residual(x, y, by, border=None):
        given.append(("gated_residual", by.shape, border))
        return (x.float() + y.float() * rows(by, x, border)).to(x.dtype)

    def add_and_cast(x, y):
        given.append(("add_and_cast",))
        return torch.Tensor(x + y), (x + y).float()

    stand_in = SimpleNamespace(modulate=modulate, gated_residual=gated_residual, add_and_cast=add_and_cast)
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.modulation", stand_in)
    monkeypatch.setattr(ops.kernels, "is_usable", lambda device: True)
    monkeypatch.setattr(ops, "is_observed", lambda *tensors: False)

    class OnDevice(torch.Tensor):
        is_cpu = False

    gate.reset()
    yield given, lambda x: x.as_subclass(OnDevice)
    gate.reset()


@pytest.mark.parametrize("kind", ["row", "two rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_what_kernels_are_given_gives_the_bits_of_stock(dtype, kind, kernels):
    given, on_device = kernels
    x, y = torch.randn(2, 2, 9, 8).to(dtype)
    tensors = torch.randn(2, 2, 1 if kind == "row" else 2, 8)
    scale, shift = tensors if kind == "row" else (TwoRows(tensor, 4, x.shape[1]) for tensor in tensors)
    for _ in range(2):  # the second time without comparison
        assert torch.equal(ops.modulated_norm(on_device(x), _norm, scale, shift), _stock_norm(x, scale, shift))
        assert torch.equal(ops.gated_residual(on_device(x), y, shift), _stock_residual(x, y, shift))
        h, normed = ops.residual_norm(on_device(x), y, None, _norm, scale, shift)
        assert torch.equal(h, x + y)
        assert torch.equal(normed, _stock_norm(x + y, scale, shift))
    border = None if kind == "row" else 4
    modulated, gated = ("modulate", tensors[0].shape, border), ("gated_residual", tensors[1].shape, border)
    added = [] if dtype == torch.float32 else [("add_and_cast",)]  # there is nothing to cast
    assert given == [modulated, gated, *added, modulated] * 2
    assert all(verdict.exact for verdict in gate.verdicts())
    assert len(gate.verdicts()) == 2 + (dtype != torch.float32)
